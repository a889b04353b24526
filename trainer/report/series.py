"""Columns of a metrics file in bounded memory: exact up to MOST values, reduced above.

A reduced curve keeps the lowest and the highest value of every stretch of steps, so that a chart shows each spike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Point = tuple[float, float]

MOST = 4096
"""Values that are kept as they are; even."""
MANTISSA_BITS = 15
"""Bits of a number's mantissa that a reduced median keeps: its relative error is at most 2**-16."""
SORTED = 1 << 16
"""Values that a reduced median counts at a time."""


class Series:
    """A curve over the step, appended in order.

    Rows of `_table`: a stretch of `_width` consecutive points with its last step, mean, minimum and maximum, and the
    steps of these two. With `_width` 1, a stretch is a point.
    """

    def __init__(self) -> None:
        self.count = 0
        """Points appended."""
        self._width = 1
        self._table: Floats = np.empty((0, 6))
        self._open: Floats = np.empty((2, 0))
        """Steps and values of an incomplete stretch."""
        self._new: list[Floats] = []
        """Steps and values that are not in the table yet; fewer than MOST."""
        self._waiting = 0

    def extend(self, steps: Sequence[float] | Floats, values: Sequence[float] | Floats) -> None:
        """Append points [n]."""
        self.count += len(values)
        self._waiting += len(values)
        self._new.append(np.asarray([steps, values], dtype=np.float64))
        if self._waiting >= MOST:
            self._reduce()

    def _reduce(self) -> None:
        points = np.concatenate([self._open, *self._new], axis=1)
        self._new, self._waiting = [], 0
        while True:
            full = min(points.shape[1] // self._width, MOST - len(self._table))
            cut = full * self._width
            self._table = np.concatenate([self._table, _stretches(points[:, :cut], self._width)])
            points = points[:, cut:]
            if len(self._table) < MOST:
                break
            self._table = _pairs(self._table)
            self._width *= 2
        self._open = points

    def _rows(self) -> Floats:
        self._reduce()
        rest = self._open.shape[1]
        return np.concatenate([self._table, _stretches(self._open, rest)]) if rest else self._table

    def drawn(self) -> list[Point]:
        """(step, value) of all points, or of the extremes of each stretch."""
        rows = self._rows()
        if self._width == 1:
            return [(step, value) for step, value in rows[:, [0, 1]].tolist()]
        found: list[Point] = []
        for _, _, low, high, at_low, at_high in rows.tolist():
            found += sorted({(at_low, low), (at_high, high)})
        return found

    def smoothed(self) -> list[Point]:
        """Exponential mean over about a twentieth of the points, without a bias to the first."""
        rows = self._rows()
        keep = 1 - 1 / max(1.0, self.count / 20)
        mean = weight = 0.0
        found = []
        left = self.count
        for step, value, *_ in rows.tolist():
            kept = keep ** min(self._width, left)
            left -= self._width
            mean, weight = kept * mean + (1 - kept) * value, kept * weight + (1 - kept)
            found.append((step, mean / weight))
        return found


def _stretches(points: Floats, width: int) -> Floats:
    """Rows of `Series._table` for points [2, n], n a multiple of `width`."""
    steps, values = points.reshape(2, -1, max(width, 1))
    if width <= 1:
        steps, values = steps[:, 0], values[:, 0]
        return np.stack([steps, values, values, values, steps, steps], axis=1)
    # A value that is not a number would hide the others.
    rows, known = np.arange(len(steps)), np.isfinite(values)
    low = np.where(known, values, np.inf).argmin(axis=1)
    high = np.where(known, values, -np.inf).argmax(axis=1)
    columns = steps[:, -1], values.mean(axis=1), values[rows, low], values[rows, high]
    return np.stack([*columns, steps[rows, low], steps[rows, high]], axis=1)


def _pairs(table: Floats) -> Floats:
    """The table with each two neighbouring rows merged."""
    first, second = table[::2], table[1::2]
    low = np.where((first[:, 2] <= second[:, 2])[:, None], first[:, [2, 4]], second[:, [2, 4]])
    high = np.where((first[:, 3] >= second[:, 3])[:, None], first[:, [3, 5]], second[:, [3, 5]])
    mean = (first[:, 1] + second[:, 1]) / 2
    return np.stack([second[:, 0], mean, low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)


class Median:
    """The median of finite numbers."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._keys: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Different values, rounded and in order; empty as long as all values are kept."""
        self._counts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def extend(self, values: Iterable[float]) -> None:
        self._values += values
        if len(self._values) >= (SORTED if len(self._keys) else MOST + 1):
            self._count()

    def _count(self) -> None:
        keys, counts = np.unique(_key(np.asarray(self._values, dtype=np.float64)), return_counts=True)
        place = np.searchsorted(self._keys, keys)
        old = place < len(self._keys)
        old[old] = self._keys[place[old]] == keys[old]
        self._counts[place[old]] += counts[old]
        self._keys = np.insert(self._keys, place[~old], keys[~old])
        self._counts = np.insert(self._counts, place[~old], counts[~old])
        self._values = []

    def value(self) -> float | None:
        """None without a value."""
        if not len(self._keys):
            return statistics.median(self._values) if self._values else None
        if self._values:
            self._count()
        ends = np.cumsum(self._counts)
        middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        return float(_number(self._keys[middle]).mean())


_SHIFT = 52 - MANTISSA_BITS


def _key(values: Floats) -> NDArray[np.int64]:
    """Integers in the order of the values, equal for those that agree in sign, exponent and MANTISSA_BITS bits."""
    bits = values.view(np.int64)
    return np.where(bits < 0, bits ^ np.int64(0x7FFFFFFFFFFFFFFF), bits) >> _SHIFT


def _number(keys: NDArray[np.int64]) -> Floats:
    """The value in the middle of those with each key."""
    bits = (keys << _SHIFT) | (1 << (_SHIFT - 1))
    return np.where(bits < 0, bits ^ np.int64(0x7FFFFFFFFFFFFFFF), bits).view(np.float64)


class Mean:
    """Number, mean and standard deviation of numbers."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._before = (0, 0.0, 0.0)
        """Of earlier values: number, mean, sum of squared differences from it."""

    def extend(self, values: Iterable[float]) -> None:
        self._values += values
        if len(self._values) > MOST:
            self._before = self._merged()
            self._values = []

    def _merged(self) -> tuple[int, float, float]:
        """As `_before`, of all values (Chan, Golub, LeVeque 1979)."""
        number, mean, squares = self._before
        new = len(self._values)
        if not new:
            return self._before
        own = math.fsum(self._values) / new
        apart, total = own - mean, number + new
        squares += math.fsum((value - own) ** 2 for value in self._values) + apart**2 * number * new / total
        return total, mean + apart * new / total, squares

    @property
    def count(self) -> int:
        return self._before[0] + len(self._values)

    @property
    def mean(self) -> float | None:
        """None without a value."""
        if not self._before[0]:
            return statistics.fmean(self._values) if self._values else None
        return self._merged()[1]

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the population that the values are a sample of; None for fewer than two."""
        if not self._before[0]:
            return statistics.stdev(self._values) if len(self._values) > 1 else None
        number, _, squares = self._merged()
        return math.sqrt(squares / (number - 1))
