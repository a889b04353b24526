"""`bifrost ablate`: the trainings and evaluations of a suite, its table and its plot."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.atomic import write_atomic
from ...slurm.io import write_json
from ..errors import writing
from .options import RanksOption

if TYPE_CHECKING:
    from ...recipes.suite import Suite
    from ..ablation.trials import Trial

TABLE, RECORD, PLOT = "table.md", "table.json", "plot.svg"


def ablate(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of a shipped one.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of its runs and scores.", show_default="runs/ablations/SUITE")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this question; may be repeated.")] = None,
    ranks: RanksOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands that are still to be run, and stop.")
    ] = False,
    slurm: Annotated[
        str | None,
        typer.Option(help="Print commands that submit the trainings, with these options of `bifrost slurm submit`."),
    ] = None,
) -> None:
    """Compare a recipe's choices: train and evaluate every row of a suite with every seed; one table, one plot.

    What is done is not repeated: the same command continues after an interruption.
    """
    from ...recipes.suite import load_suite
    from ..ablation.run import claim, missing, run_trials
    from ..ablation.trials import trials

    name, loaded = load_suite(suite)
    folder = out or Path("runs", "ablations", name)
    planned = trials(loaded, folder, only or ())
    if dry_run or slurm is not None:
        words = [each for trial in planned for each in missing(trial)]
        if slurm is not None:
            words = [["slurm", "submit", *shlex.split(slurm), *each[1:]] for each in words if each[0] == "train"]
        for line in dict.fromkeys(shlex.join(["bifrost", *each]) for each in words):
            print(line)
        return
    claim(folder, loaded)
    code = run_trials(planned, ranks)
    _write(folder, loaded, planned)
    raise typer.Exit(code)


def _write(folder: Path, suite: Suite, planned: list[Trial]) -> None:
    """Write table and plot of the trials that are done, and print the table."""
    from ..ablation.plot import plot
    from ..ablation.table import markdown, record, rows

    found = rows(suite, planned)
    if not found:
        return
    text = markdown(suite, found)
    with writing(folder):
        write_atomic(folder / TABLE, text.encode())
        write_json(folder / RECORD, record(suite, found))
        write_atomic(folder / PLOT, plot(suite, found))
    print(text, end="")
    print(f"{folder}: {TABLE}, {RECORD}, {PLOT}")
