"""A run in TensorBoard: one event file in the run folder, with the current content of its metrics file."""

from __future__ import annotations

import io
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ...recipes.secrets import redact
from ...slurm.rank_env import host_name
from .evaluations import FILE as EVALUATIONS
from .metrics import Tail
from .renames import PREVIEWS
from .series import series, when
from .tensorboard_events import EventFile
from .tracker_errors import one_line
from .tracker_state import last_end, lock, new_previews, outcome_of, read_recipe

FOLDER = "tensorboard"
PREFIX = "events.out.tfevents."
"""TensorBoard reads files with this name, in alphabetical order."""
ASIDE = ".events.partial"
PREVIEWS_EVERY_S = 30.0  # seconds between checks for new previews during training


class TensorboardLog:
    """The event file of a run: its metrics, evaluations, previews, recipe and status.

    An event file can only be appended to, and a run drops steps when it resumes or rolls back. Therefore each attempt,
    each change of earlier lines and each error begins a new file with the complete history, which replaces the old one
    once it is written.

    Raises RunError if `run_dir` has no recipe or another process is writing it, OSError if it cannot be written.
    """

    def __init__(self, run_dir: Path, live: bool):
        self.folder = run_dir
        self.recipe = redact(yaml.safe_dump(read_recipe(run_dir), sort_keys=False))
        self._lock = lock(run_dir / ".tensorboard.lock")
        self.server = str(run_dir / FOLDER)
        self.sent = 0
        self.file_error: str | None = None
        self._file: EventFile | None = None

    def push(self, last: bool) -> None:
        """Append new points, and periodically and on the `last` call, previews. Raises OSError; the next call then
        begins a new file."""
        try:
            if self._file is not None and not self._append(self._file):
                self._discard()
            if self._file is None:
                self._file = self._begin()
            if last or time.monotonic() >= self._previews_due:
                self._send_previews(self._file)
            self._file.flush()
        except Exception:
            self._discard()
            raise

    def end(self, otherwise: str | None) -> None:
        """Write the outcome of the newest `end` event unless the run was restarted since, else `otherwise` if not None,
        and close the file."""
        assert self._file is not None
        last = last_end(self.folder / "metrics.jsonl")
        outcome = outcome_of(last, otherwise)
        if outcome:
            self._file.text(when(last or {}), max(self._reached.values(), default=0), "status", outcome)
        self._file.close()
        self._file = None

    def address(self) -> str:
        return f"`tensorboard --logdir {self.folder.parent}`"

    def close(self) -> None:
        self._lock.close()

    def _begin(self) -> EventFile:
        """Write a new file with everything, and empty the one before."""
        folder = self.folder / FOLDER
        folder.mkdir(exist_ok=True)
        older = [file for file in folder.iterdir() if file.name.startswith(PREFIX)]
        self._file = file = EventFile(folder / ASIDE)
        file.text(time.time(), 0, "recipe", f"```yaml\n{self.recipe}```")
        self._tails = [Tail(self.folder / "metrics.jsonl"), Tail(self.folder / EVALUATIONS)]
        self._reached: dict[str, int] = {}
        self._previews: dict[str, tuple[int, int]] = {}
        self.sent = 0
        self._append(file)
        self._send_previews(file)
        file.flush()
        # A later name than those of the others, for a TensorBoard that is following them.
        since = max([int(time.time()), *(began(each.name) + 1 for each in older)])
        os.rename(folder / ASIDE, folder / f"{PREFIX}{since:010d}.{host_name()}.{os.getpid()}.0")
        for each in older:
            if each.stat().st_size:  # a TensorBoard that is reading it would not find the next one if it were gone
                os.truncate(each, 0)
            else:
                each.unlink()
        return file

    def _append(self, file: EventFile) -> bool:
        """Append what is new, by step; return False if the file has to be written again: earlier records have changed,
        or a series would step back, on which TensorBoard drops its later points."""
        records = [record for tail in self._tails for record in tail.read()]
        if any(tail.replaced for tail in self._tails):
            return False
        for record in sorted(filter(_has_step, records), key=lambda record: record["step"]):
            points = dict(series(record))
            step: int = record["step"]
            if any(step < self._reached.get(tag, 0) for tag in points):
                return False
            self._reached.update(dict.fromkeys(points, step))
            if points:
                file.scalars(when(record), step, points)
                self.sent += len(points)
        return True

    def _send_previews(self, file: EventFile) -> None:
        from PIL import Image

        self.file_error, self._previews_due = None, time.monotonic() + PREVIEWS_EVERY_S
        for preview in new_previews(self.folder, self._previews):
            try:
                png = preview.path.read_bytes()
                with Image.open(io.BytesIO(png)) as image:
                    size = image.size
            except OSError as error:
                self.file_error = one_line(error)
                del self._previews[preview.path.name]
            else:
                file.image(preview.written, preview.step, PREVIEWS, png, size)

    def _discard(self) -> None:
        """Close the file, which the next one replaces, and remove an incomplete one."""
        if self._file is not None:
            with suppress(OSError):  # it flushes, which has failed before
                self._file.close()
        self._file = None
        with suppress(OSError):
            (self.folder / FOLDER / ASIDE).unlink(missing_ok=True)


def _has_step(record: dict[str, Any]) -> bool:
    return isinstance(record.get("step"), int)


def began(name: str) -> int:
    """The time in the name of an event file."""
    found = re.match(r"\d+", name.removeprefix(PREFIX))
    return int(found[0]) if found else 0
