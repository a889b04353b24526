"""Small JSON files on shared storage: whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data.atomic import write_atomic


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one move: a reader on any node finds the old file or the new one. Raises OSError."""
    write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The value in `path`, or None where there is no such file. Raises OSError, and ValueError on other content."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
