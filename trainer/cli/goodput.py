"""`bifrost goodput`: where the time of a run went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.units import counted, format_seconds
from ...slurm.run_folder import no_run
from ..errors import RunError
from ..monitors.goodput import summary
from ..terminal import terminal

MEANING = {
    "step": "steps that count, without waiting for data",
    "data_wait": "waiting for data",
    "startup": "first attempt, up to its first step",
    "recovery": "from an attempt's last heartbeat to when the next is ready",
    "save": "training blocked by saves",
    "lost": "steps that had to be done again",
    "other": "previews, validations, the end of an attempt, unaccounted time",
}


def goodput(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where the time of RUN went, over all its attempts."""
    if not (run / "metrics.jsonl").is_file():
        raise RunError(no_run(run, "metrics.jsonl"))
    found = summary(run)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "time", "share", "")
    for kind, seconds in found["seconds"].items():
        table.add_row(kind, format_seconds(seconds), f"{seconds / found['wall_s']:.1%}", MEANING[kind])
    table.add_row(
        "all",
        format_seconds(found["wall_s"]),
        "",
        f"{counted(found['attempts'], 'attempt')}, {counted(found['step'], 'step')}",
    )
    console = terminal()
    console.print(table)
    lost = f", {counted(found['lost_steps'], 'step')} repeated" if found["lost_steps"] else ""
    console.print(f"effective training time ratio {found['ettr']:.1%}{lost}")
