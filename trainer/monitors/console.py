"""Console output of a run: a progress bar on a terminal, plain lines in a file. Rank 0 prints, other ranks log."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...recipes.secrets import redact
from ..terminal import terminal

log = logging.getLogger("bifrost")


class Console:
    """Shows metric records. steps: total steps of the run. done: steps done before this attempt."""

    def __init__(self, steps: int, done: int, shown: bool) -> None:
        self.shown = shown
        self._bar: Progress | None = None
        if shown and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=terminal())
            self._task = self._bar.add_task("training", total=steps, completed=done)
            self._bar.start()

    def metrics(self, record: Mapping[str, Any]) -> None:
        fields = step_fields(record)
        log.info("  ".join(fields))
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=f"loss {_number(record['loss'])}")
            console, line = self._bar.console, fitting(fields, self._bar.console.width)
            self._show(lambda: console.print(line, no_wrap=True, overflow="ellipsis", crop=True))
        elif self.shown:
            self._show(lambda: print("  ".join(fields), flush=True))

    def say(self, line: str) -> None:
        log.info(line)
        if self._bar is not None:
            console = self._bar.console
            self._show(lambda: console.print(line, soft_wrap=True))
        elif self.shown:
            self._show(lambda: print(line, flush=True))

    def close(self) -> None:
        if self._bar is not None:
            self._show(self._bar.stop)

    def _show(self, write: Callable[[], None]) -> None:
        """Call `write` on standard output; the run continues if it is gone: Ctrl-C also ends a `tee` behind it."""
        try:
            write()
        except OSError as error:
            # Neither the next line nor the buffer flushed at exit may fail again.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            log.warning("standard output is gone (%s): the run continues, its output is in logs/", error)


class WithoutSecrets(logging.Formatter):
    """Redacts logins and signatures in addresses that error messages quote."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def step_fields(record: Mapping[str, Any]) -> list[str]:
    """Fields of a step line, most important first."""
    parts = {key[5:].replace("_", " "): value for key, value in record.items() if key.startswith("loss_")}
    return [
        f"step {record['step']:>6}",
        f"loss {_number(record['loss'])}",
        *(f"{name} {_number(value)}" for name, value in parts.items()),
        f"grad {_number(record['grad_norm'])}",
        f"lr {record['lr']:.2e}",
        f"{record['samples_per_s']:.1f} samples/s",
        f"wait {record['data_wait_s'] * 1000:.0f} ms",
        f"skipped {record['skipped_steps']}",
    ]


def fitting(fields: Sequence[str], width: int) -> str:
    """A line of at most `width` characters, without the least important fields; metrics.jsonl and the log have all."""
    kept = list(fields)
    for least in ("wait", "skipped", "lr", "grad"):
        if len("  ".join(kept)) > width:
            kept = [field for field in kept if not field.startswith(least)]
    return "  ".join(kept)


def log_to_file(folder: Path, rank: int) -> None:
    """Write this rank's log records to `folder/rank-00000.log`, and warnings to stderr on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank-{rank:05d}.log", delay=True)
    file.setFormatter(WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(file)
    for name in ("bifrost", "bifrost.kernels", "bifrost.trainer", "bifrost.data"):
        logging.getLogger(name).setLevel(logging.INFO)
    if rank == 0:
        screen = logging.StreamHandler(sys.stderr)
        screen.setLevel(logging.WARNING)
        screen.setFormatter(WithoutSecrets("%(levelname)s: %(message)s"))
        root.addHandler(screen)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
