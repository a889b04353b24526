"""Atomic writes and reads of small JSON files on shared storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.atomic import write_atomic


def write_json(path: Path, value: Any) -> None:
    """Write `path` atomically: readers on every node see the old or the complete new file. Raises OSError."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in `path`, None if there is no such file. Raises OSError, and ValueError for invalid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
