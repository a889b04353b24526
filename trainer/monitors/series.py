"""Names of a run's metrics in trackers, whose charts are grouped by the part before the slash."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

PERFORMANCE = re.compile(r"_s($|_)|tflops|^mfu$|^hfu$|^ettr$|slowest")
MEMORY = re.compile(r"memory|alloc_")
HELD_OUT = "val_"


def series_name(key: str, event: str | None) -> str:
    """`train/`, `validation/`, `perf/` or `memory/` plus the key of a step line, or the event plus its key, as in
    `eval/fid`."""
    if event is None and key.startswith(HELD_OUT):
        event, key = "validation", key.removeprefix(HELD_OUT)
    group = event or ("memory" if MEMORY.search(key) else "perf" if PERFORMANCE.search(key) else "train")
    return re.sub(r"[^\w\-. /]", "_", f"{group}/{key}")


def series(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each number in a record with a step."""
    if isinstance(record.get("step"), int):
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time"):
                yield series_name(key, record.get("event")), float(value)


def when(record: Mapping[str, Any]) -> float:
    """Unix time of a record."""
    return float(record.get("time", time.time()))
