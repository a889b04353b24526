"""What an all-gather of weights reaches when nothing runs beside it: measured now and then, at log lines."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ..distributed.process_group import Ranks
from .phase_timer import Sections

LINES = 100
"""Log lines from one measurement to the next; the first is at the first line of a start."""


class Links:
    """elements: of a gather, as large as those of the steps; dtype: of the weights."""

    def __init__(self, ranks: Ranks, section: Sections, elements: int, dtype: torch.dtype) -> None:
        self.ranks, self.section, self.dtype = ranks, section, dtype
        self.share = elements // ranks.size
        self._lines = 0

    def look(self) -> dict[str, float]:
        """`gather_peak_gb_per_s`, GB/s that this rank received, where it was time to measure. For all ranks, at log
        lines; the device is waited for."""
        due = self._lines % LINES == 0
        self._lines += 1
        if not due or self.ranks.size == 1 or not self.share:
            return {}
        with self.section("links"):
            mine = torch.zeros(self.share, dtype=self.dtype, device=self.ranks.device)
            whole = mine.new_empty(self.share * self.ranks.size)
            self._gather(whole, mine)  # the ranks meet, and memory is touched
            begun = time.perf_counter()
            self._gather(whole, mine)
            seconds = time.perf_counter() - begun
        return {"gather_peak_gb_per_s": mine.nbytes * (self.ranks.size - 1) / seconds / 1e9}

    def _gather(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        dist.all_gather_into_tensor(whole, mine)
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
