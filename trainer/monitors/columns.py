"""Metric lines by column: one pass over a long file handles thousands of lines at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


class Lines:
    """Consecutive metric lines of a file, without an event between them."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records
        self.layouts = dict.fromkeys([layout] if (layout := one_layout(records)) else map(tuple, records))
        """The different orders of keys."""
        self.keys = dict.fromkeys(key for layout in self.layouts for key in layout)
        self._columns: dict[str, Sequence[Any]] = {}
        self._plain: dict[str, bool] = {}

    def __len__(self) -> int:
        return len(self.records)

    @property
    def steps(self) -> Sequence[int]:
        return self.values("step")

    def values(self, key: str) -> Sequence[Any]:
        """The value under `key` in every line, None without one."""
        if key not in self._columns:
            everywhere = len(self.layouts) == 1 and key in self.keys
            records = self.records
            self._columns[key] = tuple(
                [each[key] for each in records] if everywhere else [each.get(key) for each in records]
            )
        return self._columns[key]

    def all_numbers(self, key: str) -> bool:
        """Whether every line has a number under `key`."""
        if key not in self._plain:
            self._plain[key] = set(map(type, self.values(key))) <= {float, int}
        return self._plain[key]

    def numbers(self, key: str) -> Sequence[float]:
        """The numbers under `key`, in order."""
        values = self.values(key)
        return values if self.all_numbers(key) else [value for value in values if isinstance(value, (int, float))]

    def points(self, key: str) -> tuple[Floats, Floats]:
        """Steps [n] and values [n] of the lines with a number under `key`."""
        import numpy as np

        steps = np.array(self.steps, dtype=np.float64)
        if not self.all_numbers(key):
            steps = steps[[isinstance(value, (int, float)) for value in self.values(key)]]
        return steps, np.array(self.numbers(key), dtype=np.float64)


def one_layout(records: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """The keys of all records, if they have the same in the same order."""
    first = tuple(records[0])
    return first if all(map(first.__eq__, map(tuple, records))) else None


def blocks(records: Iterable[list[dict[str, Any]]]) -> Iterator[dict[str, Any] | Lines]:
    """The records of lists in order: each event by itself, consecutive metric lines of a list together."""
    for each in records:
        lines: list[dict[str, Any]] = []
        for record in each:
            if "event" not in record and type(record.get("step")) is int:
                lines.append(record)
                continue
            if lines:
                yield Lines(lines)
                lines = []
            yield record
        if lines:
            yield Lines(lines)
