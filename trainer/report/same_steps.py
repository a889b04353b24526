"""Losses and samples of the steps that two runs have in common, from one pass over both metrics files."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..monitors.columns import Lines
from ..training.data_digest import comparable
from .series import Mean, Series


class Rows(NamedTuple):
    """Steps in increasing order, with the loss and the data digest of each, None without one."""

    steps: tuple[int, ...] = ()
    losses: tuple[Any, ...] = ()
    digests: tuple[Any, ...] = ()

    @classmethod
    def of(cls, lines: Lines) -> Rows:
        return cls(tuple(lines.steps), tuple(lines.values("loss")), tuple(lines.values("data_digest")))

    def followed_by(self, other: Rows) -> Rows:
        """Both; of a repeated step, the later one."""
        if not self.steps or not other.steps or self.steps[-1] < other.steps[0]:
            return Rows(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
        last = {row[0]: row for row in (*zip(*self, strict=True), *zip(*other, strict=True))}
        return Rows(*zip(*(last[step] for step in sorted(last)), strict=True))

    def cut(self, at: int) -> tuple[Rows, Rows]:
        return Rows(*(column[:at] for column in self)), Rows(*(column[at:] for column in self))

    def only(self, steps: set[int]) -> Rows:
        kept = [row for row in zip(*self, strict=True) if row[0] in steps]
        return Rows(*zip(*kept, strict=True)) if kept else Rows()


def matched(first: Iterator[Rows], other: Iterator[Rows]) -> Iterator[tuple[Rows, Rows]]:
    """The rows of the steps that both have, in order. Reads both to their end, and holds a few of each."""
    sources, held, reached = (first, other), [Rows(), Rows()], [-math.inf, -math.inf]
    while min(reached) < math.inf:
        behind = reached.index(min(reached))
        rows = next(sources[behind], None)
        if rows is None:
            reached[behind] = math.inf
        else:
            held[behind] = held[behind].followed_by(rows)
            reached[behind] = max(reached[behind], rows.steps[-1])
        # What comes has later steps.
        cuts = [rows.cut(bisect_right(rows.steps, min(reached))) for rows in held]
        held = [later for _, later in cuts]
        one, two = (done for done, _ in cuts)
        if one.steps != two.steps:
            common = set(one.steps) & set(two.steps)
            one, two = one.only(common), two.only(common)
        if one.steps:
            yield one, two


class SameSteps:
    """The differences between two runs, other minus first, of the steps that both logged."""

    def __init__(self) -> None:
        self.apart = Series()
        """The difference of the losses over the step."""
        self._difference, self._distance = Mean(), Mean()
        self._equal = True
        self._largest, self._largest_at, self._last = 0.0, 0, 0.0
        self._same_to: int | None = None
        self._other_at: int | None = None

    def add(self, first: Rows, other: Rows) -> None:
        """Add rows of the same steps."""
        known = [
            (step, after - before)
            for step, before, after in zip(first.steps, first.losses, other.losses, strict=True)
            if isinstance(before, (int, float)) and isinstance(after, (int, float))
        ]
        if known:
            self._add_losses([step for step, _ in known], [apart for _, apart in known])
        if self._other_at is None:
            self._add_samples(first.steps, first.digests, other.digests)

    def _add_losses(self, steps: Sequence[int], apart: Sequence[float]) -> None:
        distance = [*map(abs, apart)]
        largest = max(distance)
        if not self.apart.count or largest > abs(self._largest):
            at = distance.index(largest)
            self._largest, self._largest_at = apart[at], steps[at]
        self._equal = self._equal and not largest
        self._last = apart[-1]
        self.apart.extend(steps, apart)
        self._difference.extend(apart)
        self._distance.extend(distance)

    def _add_samples(self, steps: Sequence[int], first: Sequence[Any], other: Sequence[Any]) -> None:
        for step, before, after in zip(steps, first, other, strict=True):
            if comparable(before, after):
                if before != after:
                    self._other_at = step
                    return
                self._same_to = step

    def losses(self) -> dict[str, Any]:
        """`lines`: number of steps for which both logged a loss; the differences."""
        if not self.apart.count:
            return {"lines": 0}
        return {
            "lines": self.apart.count,
            "equal": self._equal,
            "mean_difference": self._difference.mean,
            "mean_distance": self._distance.mean,
            "largest": self._largest,
            "largest_at": self._largest_at,
            "last": self._last,
        }

    def samples(self) -> dict[str, Any]:
        """The last logged step up to which both consumed the same samples, and the first at which they had not; None if
        there is no such step."""
        return {"same_samples_to": self._same_to, "other_samples_at": self._other_at}
