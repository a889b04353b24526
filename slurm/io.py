"""Atomic writes and reads of JSON files on shared storage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.atomic import write_atomic

BLOCK = 1 << 18
"""Bytes read at a time."""


def write_json(path: Path, value: Any) -> None:
    """Write `path` atomically: readers on every node see the old or the complete new file. Raises OSError."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in `path`, None if there is no such file. Raises OSError, and ValueError for invalid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def newest_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object per line, the last one first, without torn lines; none without a file.
    Reads only as far back as it is iterated. Raises OSError."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        begin, rest = os.fstat(file.fileno()).st_size, b""  # rest: the end of a line that begins before `begin`
        while begin:
            size = min(BLOCK, begin)
            begin -= size
            file.seek(begin)
            first, *lines = (file.read(size) + rest).split(b"\n")
            if begin:
                rest = first
            else:
                lines.insert(0, first)
            for line in reversed(lines):
                try:
                    record = json.loads(line)
                except ValueError:  # torn by a crash, or the end of the file
                    continue
                if isinstance(record, dict):
                    yield record
