"""The metrics file of a run: one JSON object per line, append-only; trackers mirror it."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data.atomic import write_atomic
from ...recipes.secrets import redact
from .columns import one_layout
from .renames import METRICS, with_new_names

log = logging.getLogger(__name__)
CHUNK = 1 << 18
"""Bytes read or copied at a time."""


class MetricsFile:
    """Appends to `metrics.jsonl`. Thread-safe. A write failure does not stop the run: the first one is logged, and
    lines are lost until the disk accepts writes again.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._failing = False
        self._torn = True  # whether the file may end inside a line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` as a line, with the Unix time as `time` unless it is set.

        The file is reopened each time, so that the line is visible on other nodes when this returns.
        """
        line = redact(json.dumps({"time": time.time(), **record})) + "\n"
        with self._lock:
            self._append(line)

    def _append(self, line: str) -> None:
        try:
            with open(self.path, "ab+") as file:
                if self._torn and file.tell() and _last_byte(file) != b"\n":
                    line = "\n" + line
                self._torn = True
                file.write(line.encode())
        except OSError as error:
            if not self._failing:
                log.error("%s cannot be written, metric lines are lost: %s", self.path, error.strerror)
            self._failing = True
        else:
            self._torn = self._failing = False

    def rewind(self, step: int) -> int:
        """Drop the metric lines after `step` and truncated lines; events stay, and all lines get the current names.
        Returns the number of lines dropped.

        For a resume, before the first `write`: the run logs those steps again. The file is replaced atomically. Raises
        OSError.
        """
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            same = 0  # bytes of the lines before the first that changes
            for line in file:
                if _kept(line, step) is not line:
                    break
                same += len(line)
            else:
                return 0
            dropped = renamed = 0

            def parts() -> Iterator[bytes]:
                nonlocal dropped, renamed
                file.seek(0)
                for begin in range(0, same, CHUNK):
                    yield file.read(min(CHUNK, same - begin))
                for line in file:
                    kept = _kept(line, step)
                    dropped += kept is None
                    renamed += kept is not None and kept is not line
                    yield kept or b""

            write_atomic(self.path, parts())
        if renamed:
            log.info("%s was begun by an earlier version: names replaced by today's, see CHANGELOG.md", self.path)
        return dropped


class Tail:
    """Follows a metrics file: each `read` returns the records appended since the previous one.

    A file that was replaced (`rewind`) or truncated is read again from its beginning; `replaced` is then True.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.replaced = False
        """Whether the last `read` began again with another content than the one before."""
        self._inode = self._position = 0

    def read(self) -> list[dict[str, Any]]:
        """New records, without an incomplete last line. Raises OSError."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            again = status.st_ino != self._inode or status.st_size < self._position
            self.replaced = again and self._position > 0
            if again:
                self._inode, self._position = status.st_ino, 0
            file.seek(self._position)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._position += len(data)
        return [record for line in data.splitlines() if (record := parse_line(line)) is not None]


def iter_metrics(path: str | Path) -> Iterator[list[dict[str, Any]]]:
    """The records of a metrics file in order, in lists, without lines truncated by a crash or a full disk; none without
    a file. Raises OSError."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        while lines := file.readlines(CHUNK):
            if not lines[-1].endswith(b"\n"):
                lines.pop()
            if found := _parse(lines):
                yield found


def _parse(lines: list[bytes]) -> list[dict[str, Any]]:
    """`parse_line` of all lines, without None."""
    from pydantic_core import from_json

    try:
        # A line break is not allowed in a string, so that no two torn lines make a record together unnoticed.
        records = from_json(b"[" + b",\n".join(lines) + b"]", cache_strings="keys")
        whole = len(records) == len(lines) and set(map(type, records)) == {dict}
    except ValueError:
        whole = False
    if not whole:
        return [record for line in lines if (record := parse_line(line)) is not None]
    if (keys := one_layout(records)) and "event" not in keys and METRICS.keys().isdisjoint(keys):
        return records  # nearly all of a long file
    return [
        record if "event" not in record and record.keys().isdisjoint(METRICS) else with_new_names(record)
        for record in records
    ]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All of `iter_metrics`; for files that are known to be short."""
    return [record for records in iter_metrics(path) for record in records]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a metrics file in order, without its metric lines, of which a long run has many more; none without
    a file. Raises OSError."""
    try:
        with open(path, "rb") as file:
            found = (parse_line(line) for line in file if b'"event"' in line and line.endswith(b"\n"))
            return [record for record in found if record is not None and "event" in record]
    except FileNotFoundError:
        return []


def last_lines(path: str | Path, size: int) -> list[bytes]:
    """Lines that start in the last `size` bytes of a metrics file; the last one may be truncated. Raises OSError."""
    with open(path, "rb") as file:
        begin = max(0, os.fstat(file.fileno()).st_size - size)
        file.seek(begin)
        return file.read().splitlines()[begin > 0 :]


def record_interruption(path: Path) -> None:
    """Append the `end` event of an attempt whose ranks were ended without a save, to the metrics file that they had
    begun. Does nothing without an attempt that has not ended. Failures are logged."""
    try:
        lines = last_lines(path, 2**16)
    except OSError:
        return
    records = [record for line in lines if (record := parse_line(line)) is not None]
    if records and records[-1].get("event") != "end":
        MetricsFile(path).write({"event": "end", "step": records[-1].get("step", 0), "outcome": "interrupted"})


def finite(value: float) -> float | None:
    """The value, or None if it is not finite, which JSON cannot represent."""
    return value if math.isfinite(value) else None


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line, with today's names; None where a crash or a full disk tore it."""
    record = _as_written(line)
    return None if record is None else with_new_names(record)


def _as_written(line: bytes) -> dict[str, Any] | None:
    from pydantic_core import from_json  # several times faster than json

    try:
        record = from_json(line)
    except ValueError:
        try:
            record = json.loads(line)  # accepts the lone surrogates of names that are not UTF-8
        except ValueError:
            return None
    return record if isinstance(record, dict) else None


def _kept(line: bytes, step: int) -> bytes | None:
    """A line that stays when the run goes back to `step`, with today's names; None for another one."""
    record = _as_written(line) if line.endswith(b"\n") else None
    if record is None or ("event" not in record and record.get("step", 0) > step):
        return None
    renamed = with_new_names(record)
    return line if renamed is record else json.dumps(renamed).encode() + b"\n"


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)
