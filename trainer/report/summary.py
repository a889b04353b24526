"""What the pages show of a metrics file, from one pass over it in bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..monitors.columns import Lines, blocks
from ..monitors.goodput import Ledger
from ..monitors.metrics import iter_metrics
from .series import Median, Series
from .timeline import Attempts

SHOWN = 40
"""Maximum rows of a table of events: the newest."""
CHECKPOINT = "checkpoint"
TROUBLE = ("skipped_step", "rollback", "baseline_reset", "bad_samples", "save_failed", "straggler", "hang")
DRAWN = (
    "loss",
    "val_loss",
    "val_loss_ema",
    "samples_per_s",
    "peak_memory_gib",
    "memory_headroom_gib",
    "lr",
    "grad_norm",
    "mfu",
    "hfu",
    "tflops_per_device",
    "rank_work_s_max",
    "rank_work_s_median",
    "allgather_gb_per_s",
    "alloc_retries",
)
"""Metrics with a curve, in addition to the parts of the loss."""
PART = "loss_"
"""Prefix of the parts of the loss."""
SOURCE = "source_loss_"
"""Prefix of the losses of the sources of a mixture."""
BASE = "base_loss_"
"""Prefix of the frozen base's losses on understanding sources."""
LAST = ("samples", "peak_memory_gib", "memory_headroom_gib", "alloc_retries", "skipped_steps")
"""Metrics whose last value is compared."""
MEDIANS = ("samples_per_s", "tokens_per_s", "step_s", "tflops_per_device", "mfu", "hfu")
"""Metrics whose median is compared."""

Line = dict[str, Any]


class Summary:
    """Curves, events and figures of a run. drawn: metrics with a curve, default all of DRAWN and all parts of the
    loss; compared: also the figures for a comparison."""

    def __init__(self, drawn: Sequence[str] | None = None, compared: bool = False) -> None:
        self._drawn = tuple(DRAWN if drawn is None else drawn)
        self._parts = drawn is None
        self.curves: dict[str, Series] = {}
        """Metric -> its curve; of metrics that occur."""
        self.parts: list[str] = []
        """The parts of the loss, in order of appearance."""
        self.sources: list[str] = []
        """The losses of the sources, in order of appearance."""
        self.bases: list[str] = []
        """The frozen base's losses on understanding sources, in order of appearance."""
        self.waiting = Series()
        """Percentage of the step for which rank 0 waited for data."""
        self.checkpoints = Series()
        """Steps and Unix times of the checkpoints."""
        self.last: Line | None = None
        """The last metric line."""
        self.last_values: dict[str, float] = {}
        self.medians = {key: Median() for key in MEDIANS} if compared else {}
        self.step_s = self.data_wait_s = 0.0
        """Sums over the metric lines."""
        self.slowest: Counter[int] = Counter()
        """Rank -> metric lines on which it had the most work."""
        self.counts: Counter[str] = Counter()
        """Event -> number of them."""
        self.newest: dict[str, deque[Line]] = {kind: deque(maxlen=SHOWN) for kind in ("checkpoint", "trouble")}
        self.turn: Line | None = None
        """The last event that started or ended an attempt; of a file without one, any record."""
        self.attempts = Attempts()
        self.ledger = Ledger()
        self._layouts: set[tuple[str, ...]] = set()

    def read(self, path: Path) -> Iterator[Lines]:
        """Add the records of a metrics file, and yield its metric lines in order. Raises OSError."""
        for part in blocks(iter_metrics(path)):
            if isinstance(part, Lines):
                self._add_lines(part)
                yield part
            else:
                self._add(part)

    def load(self, other: Summary) -> None:
        """Become a copy of another one, such as one that a process has read."""
        self.__dict__.update(other.__dict__)

    def read_all(self, path: Path) -> Summary:
        """`read` to its end. Raises OSError."""
        for _ in self.read(path):
            pass
        return self

    def _add(self, record: Line) -> None:
        self.attempts.add(record)
        self.ledger.add(record)
        kind = record.get("event")
        if kind in ("start", "end", "hang") or self.turn is None:
            self.turn = record
        if not isinstance(kind, str):
            return
        self.counts[kind] += 1
        if kind == CHECKPOINT:
            self.newest["checkpoint"].append(record)
            self.checkpoints.extend([record["step"]], [record["time"]])
        elif kind in TROUBLE:
            self.newest["trouble"].append(record)

    def _add_lines(self, lines: Lines) -> None:
        self.attempts.add_lines(lines)
        self.ledger.add_lines(lines)
        self.turn = self.turn or lines.records[-1]
        self.last = lines.records[-1]
        if not lines.layouts.keys() <= self._layouts:
            self._layouts |= lines.layouts.keys()
            self.parts += [key for key in lines.keys if key.startswith(PART) and key not in self.parts]
            self.sources += [key for key in lines.keys if key.startswith(SOURCE) and key not in self.sources]
            self.bases += [key for key in lines.keys if key.startswith(BASE) and key not in self.bases]
        for key in (*self._drawn, *((*self.parts, *self.sources, *self.bases) if self._parts else ())):
            if key in lines.keys:
                self.curves.setdefault(key, Series()).extend(*lines.points(key))
        if self.medians:
            self._add_figures(lines)
        else:
            self._add_ranks(lines)

    def _add_ranks(self, lines: Lines) -> None:
        if "slowest_rank" in lines.keys:
            self.slowest.update(line["slowest_rank"] for line in lines.records if "slowest_rank" in line)
        rows = zip(lines.steps, lines.values("step_s"), lines.values("data_wait_s"), strict=True)
        known = [(step, 100 * wait / step_s) for step, step_s, wait in rows if step_s and wait is not None]
        if known:
            self.waiting.extend(*zip(*known, strict=True))

    def _add_figures(self, lines: Lines) -> None:
        for key, median in self.medians.items():
            if key in lines.keys:
                median.extend(lines.numbers(key))
        for key in LAST:
            numbers = (value for value in reversed(lines.values(key)) if isinstance(value, (int, float)))
            if key in lines.keys and (last := next(numbers, None)) is not None:
                self.last_values[key] = last
        self.step_s = sum((value for value in lines.values("step_s") if value is not None), self.step_s)
        self.data_wait_s = sum((value or 0.0 for value in lines.values("data_wait_s")), self.data_wait_s)
