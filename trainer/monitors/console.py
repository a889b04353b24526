"""What a person sees of a run: a progress bar on a terminal, plain lines in a file. Rank 0 speaks, the others log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..terminal import terminal

log = logging.getLogger("bifrost")


class Console:
    """Shows the metric records; `steps` is the run's length, `done` where it starts."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.shown = shown
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=terminal())
            self._task = self._bar.add_task("training", total=steps, completed=done)
            self._bar.start()

    def metrics(self, record: Mapping[str, Any]) -> None:
        parts = {key[5:].replace("_", " "): value for key, value in record.items() if key.startswith("loss_")}
        line = (
            f"step {record['step']:>6}  loss {_number(record['loss'])}"
            f"{''.join(f'  {name} {_number(value)}' for name, value in parts.items())}"
            f"  grad {_number(record['grad_norm'])}  lr {record['lr']:.2e}  {record['samples_per_s']:.1f} samples/s"
            f"  wait {record['data_wait_s'] * 1000:.0f} ms  skipped {record['skipped_steps']}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=f"loss {_number(record['loss'])}")
        self.say(line)

    def say(self, line: str) -> None:
        log.info(line)
        if self._bar is not None:
            self._bar.console.print(line)
        elif self.shown:
            print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def log_to_file(folder: Path, rank: int) -> None:
    """Send this rank's log records to `folder/rank-00000.log`, warnings also to stderr on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank-{rank:05d}.log", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(file)
    for name in ("bifrost", "bifrost.kernels", "bifrost.trainer", "bifrost.data"):
        logging.getLogger(name).setLevel(logging.INFO)
    if rank == 0:
        screen = logging.StreamHandler(sys.stderr)
        screen.setLevel(logging.WARNING)
        screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(screen)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
