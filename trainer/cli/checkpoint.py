"""`bifrost checkpoint`: list, verify, show and copy the checkpoints of a run."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.progress import progress
from ...data.units import counted, format_bytes
from ...slurm.run_folder import no_checkpoint
from ..errors import RunError
from ..io import flat, read_json
from ..terminal import terminal

if TYPE_CHECKING:  # they import torch, which other commands do not need
    from ..checkpoint.manifest import Manifest
    from ..checkpoint.store import Store

MB = 10**6

app = typer.Typer(help="List, verify, show and copy the checkpoints of a run.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint.", show_default=False)]


@app.command("list")
def list_checkpoints(run: Run) -> None:
    """One line per checkpoint: step, time, ranks, size, whether every file matches its hash, and which is the best."""
    from rich.table import Table

    from ..checkpoint.manifest import read_manifest

    store, console = _store(run), terminal()
    table = Table("step", "saved", "ranks", "size", "verified", "lowest held-out loss")
    refused, best = [], _best(store)
    for step in store.steps():
        problems = _problems(store, step)
        refused += problems
        verdict = "no" if problems else "yes"
        try:
            manifest = read_manifest(store.folder(step))
        except RunError:
            table.add_row(str(step), "", "", "", verdict, "")
        else:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time))
            table.add_row(str(step), saved, str(manifest.ranks), _size(manifest), verdict, best.get(step, ""))
    console.print(table)
    for line in refused:
        console.print(line, soft_wrap=True)


@app.command()
def verify(run: Run, step: Step = None) -> None:
    """Read every file of one checkpoint, or of all, and compare it with its hash; exit code 1 if any is bad."""
    store, console = _store(run), terminal()
    bad = False
    for each in store.steps() if step is None else [store.require(step)]:
        problems = _problems(store, each)
        bad = bad or bool(problems)
        for line in problems or [f"{store.folder(each).name}: verified"]:
            console.print(line, soft_wrap=True)
    if bad:
        raise typer.Exit(1)


@app.command()
def show(run: Run, step: Step = None) -> None:
    """State, parameters and sizes of one checkpoint, the newest or that of `--step`. Nothing is verified."""
    from rich.table import Table

    from ..checkpoint.reader import CheckpointReader

    store, console = _store(run), terminal()
    steps = store.steps()
    if step is None and not steps:
        raise RunError(f"{store.root} holds no checkpoint yet")
    reader = CheckpointReader(store.folder(store.require(steps[-1] if step is None else step)))
    line = f"{reader.folder}: saved by {counted(reader.ranks, 'rank')}, {_size(reader.manifest)}"
    console.print(f"{line}, slots {', '.join(reader.slots)}", soft_wrap=True)
    state = Table("state", "value")
    for key, value in flat(reader.state):
        state.add_row(key, shown(value))
    parameters = Table("parameter", "shape", "elements")
    for name, shape in reader.shapes.items():
        parameters.add_row(name, " x ".join(map(str, shape)) or "scalar", f"{math.prod(shape):,}")
    parameters.add_section()
    total = sum(math.prod(shape) for shape in reader.shapes.values())
    parameters.add_row(f"{len(reader.shapes)} parameters", "", f"{total:,}")
    console.print(state, parameters)


@app.command()
def upload(
    run: Run,
    to: Annotated[
        str | None, typer.Option(help="Address, such as s3://bucket/runs.", show_default="checkpoint.upload")
    ] = None,
    step: Step = None,
) -> None:
    """Copy all checkpoints that have no copy, or that of `--step`, to another address, as `checkpoint.upload` does."""
    from ...recipes import load_recipe
    from ..checkpoint.copies import Copies
    from ..checkpoint.manifest import read_manifest

    store = _store(run)
    settings = load_recipe(run / "recipe.yaml", stored=True).checkpoint
    if (address := to or settings.upload) is None:
        raise RunError(f"{run}: its recipe has no checkpoint.upload; give --to ADDRESS")
    copies = Copies(run, address, settings.keep)
    copies.claim()
    missing = copies.missing(copies.there()) if step is None else [store.require(step)]
    if not missing:
        print(f"{copies.place}: has all checkpoints")
    for each in missing:
        size = sum(entry.size for entry in read_manifest(store.folder(each)).files.values())
        with progress(f"copying {store.folder(each).name}", size // MB, "MB") as shown:
            sent = copies.copy(each, store.folder(each), lambda count: shown.advance(count // MB))
        print(f"checkpoint of step {each}: {format_bytes(sent, 3)} sent to {copies.place}")


@app.command()
def download(
    place: Annotated[str, typer.Argument(help="ADDRESS/RUN, such as s3://bucket/runs/mllm-7b.", show_default=False)],
    run: Annotated[
        Path | None, typer.Argument(help="Run folder, new or of the same run.", show_default="runs/RUN")
    ] = None,
    step: Step = None,
) -> None:
    """Copy the last checkpoint, or that of `--step`, from `checkpoint.upload` into a run folder, with its recipe.

    Every file is compared with its hash. `bifrost resume` continues the run.
    """
    from ..checkpoint.copies import Copies

    address, _, name = place.rstrip("/").rpartition("/")
    folder = run or Path("runs", name)
    copies = Copies(folder, address, name=name)
    steps = copies.steps()
    chosen = max(steps) if step is None else step
    with progress(f"copying the checkpoint of step {chosen}", steps.get(chosen, 0) // MB, "MB") as shown:
        copies.fetch(chosen, lambda count: shown.advance(count // MB))
    print(f"{copies.store.folder(chosen)}: copied and verified; `bifrost resume {folder}` continues the run")


def shown(value: Any) -> str:
    """A readable form of a value of the state; for a long list, such as the accepted losses, its length and range."""
    if isinstance(value, (list, tuple)):
        rows = [row if isinstance(row, (list, tuple)) else [row] for row in value]
        alike = len({len(row) for row in rows}) == 1
        if len(rows) > 4 and alike and all(isinstance(one, (int, float)) for row in rows for one in row):
            ranges = (f"{min(column):.4g} to {max(column):.4g}" for column in zip(*rows, strict=True))
            return f"{len(rows)} entries, {', '.join(ranges)}"
        return ", ".join(map(shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _store(run: Path) -> Store:
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise RunError(no_checkpoint(run))
    from ..checkpoint.store import Store

    return Store(folder)


def _best(store: Store) -> dict[int, str]:
    """The step with the lowest held-out loss so far, and that loss; empty without validations."""
    states = [read_json(store.folder(step) / "state.json") or {} for step in store.steps()[-1:]]
    found = [state.get("progress", {}) for state in states]
    return {each["best_step"]: f"{each['best_loss']:.6g}" for each in found if each.get("best_loss") is not None}


def _problems(store: Store, step: int) -> list[str]:
    """Like `store.verify`, with one thread per CPU: hashing releases Python's lock."""
    from ..checkpoint.manifest import read_manifest

    try:
        sizes = [entry.size for _, entry in sorted(read_manifest(store.folder(step)).files.items())] or [0]
    except RunError as error:
        return [str(error)]
    label = f"verifying {store.folder(step).name}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress(label, sum(sizes) // MB, "MB") as shown:

        def check(number: int) -> list[str]:
            found = store.verify(step, (number, len(sizes)))
            shown.advance(sizes[number] // MB)
            return found

        problems = list(pool.map(check, range(len(sizes))))
    return list(dict.fromkeys(problem for found in problems for problem in found))


def _size(manifest: Manifest) -> str:
    return format_bytes(sum(entry.size for entry in manifest.files.values()), 4)
