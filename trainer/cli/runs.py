"""`bifrost runs`: all runs of a folder, one line each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.units import format_bytes
from ...slurm import SlurmError
from ...slurm.commands import waiting_jobs
from ...slurm.exit_record import STOPPED
from ...slurm.run_folder import RECIPES
from ..errors import RunError
from ..io import read_json
from ..monitors.metrics import last_lines, parse_line
from ..terminal import terminal

NEWEST = 2**18
"""Bytes read from the end of a metrics file: enough for the newest lines, however long the run."""


@dataclass(frozen=True)
class Run:
    """A run as shown by its folder. steps: of its recipe; active: Unix time of the last line or heartbeat; bytes: of
    all its checkpoints; reason: why it failed, or what it waits for."""

    name: str
    stage: str | None
    state: str
    step: int
    steps: int | None
    loss: float | None
    active: float | None
    host: str | None
    ranks: int | None
    bytes: int
    reason: str | None


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs; a recipe's runs_dir.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """All runs in FOLDER: stage, state, step, loss, last activity, where, size of the checkpoints."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give the folder that contains the run folders, a recipe's runs_dir")
    found = find_runs(folder)
    if as_json:
        print(json.dumps([asdict(run) for run in found], indent=1))
        return
    if not found:
        raise RunError(f"{folder}: contains no run; give the folder that contains the run folders, a recipe's runs_dir")
    _show(found, time.time())


def find_runs(folder: Path, now: float | None = None) -> list[Run]:
    """The runs in `folder`, the most recently active one last."""
    from ...slurm.job import FILE as JOB
    from ..report.files import is_run

    now = time.time() if now is None else now
    folders = [path for path in folder.iterdir() if is_run(path)]
    jobs = {path: str((read_json(path / JOB) or {}).get("id")) for path in folders}
    waiting: Mapping[str, str] = {}
    if any(job != "None" for job in jobs.values()):
        with suppress(SlurmError):  # no Slurm here
            waiting = waiting_jobs()
    found = [_read(path, waiting.get(jobs[path]), now) for path in folders]
    return sorted(found, key=lambda run: (run.active or 0.0, run.name))


def _read(folder: Path, waits_for: str | None, now: float) -> Run:
    from ..report.files import run_state

    records = _newest(folder / "metrics.jsonl")
    recipe = next((_recipe(file) for name in RECIPES if (file := folder / name).is_file()), {})
    environment = read_json(folder / "environment.json") or {}
    lines = [record for record in records if "event" not in record and isinstance(record.get("step"), int)]
    state, reason = run_state(records, folder, now)
    beat = (read_json(folder / "lock.json") or {}).get("beat")
    if waits_for is not None and state != "running":
        state, reason = "waiting in Slurm", waits_for
    elif state == "failed" and (recorded := (read_json(folder / STOPPED) or {}).get("reason")):
        reason = recorded
    times = [record["time"] for record in records if isinstance(record.get("time"), (int, float))]
    steps = [record["step"] for record in records if isinstance(record.get("step"), int)]
    return Run(
        name=folder.name,
        stage=recipe.get("stage"),
        state=state,
        step=lines[-1]["step"] if lines else max(steps, default=0),
        steps=recipe.get("steps"),
        loss=lines[-1].get("loss") if lines else None,
        active=max([*times, *([beat] if isinstance(beat, (int, float)) else [])], default=None),
        host=environment.get("host"),
        ranks=environment.get("ranks"),
        bytes=_size(folder / "checkpoints"),
        reason=reason if state in ("failed", "waiting in Slurm") else None,
    )


def _newest(file: Path) -> list[dict[str, Any]]:
    """The last records of a metrics file."""
    try:
        lines = last_lines(file, NEWEST)
    except OSError:
        return []
    return [record for line in lines if (record := parse_line(line)) is not None]


def _recipe(file: Path) -> dict[str, Any]:
    from ...recipes import read_yaml

    try:
        found = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written, or damaged: the other columns are still useful
        return {}
    return found if isinstance(found, dict) else {}


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`, without those that are removed meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _show(found: list[Run], now: float) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head, justify in (("run", "left"), ("stage", "left"), ("state", "left"), ("step", "right"), ("loss", "right")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for head in ("active", "ranks", "checkpoints"):
        table.add_column(head, justify="right" if head == "checkpoints" else "left")
    for run in found:
        table.add_row(
            run.name,
            run.stage or "",
            run.state,
            f"{run.step}/{run.steps}" if run.steps else str(run.step),
            "" if run.loss is None else f"{run.loss:.4g}",
            "" if run.active is None else _ago(now - run.active),
            f"{run.ranks} on {run.host}" if run.ranks else "",
            format_bytes(run.bytes, 3) if run.bytes else "",
        )
    console = terminal()
    console.print(table)
    for run in found:
        if run.reason:
            console.print(f"{run.name}: {run.reason}", soft_wrap=True)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
