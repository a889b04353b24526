"""Statistics over all ranks at a log line, in one exchange: rank work, wait for data, memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed.process_group import Ranks
from . import memory
from .phase_timer import Times
from .stragglers import WORK, Stragglers


@dataclass(frozen=True)
class RankStats:
    """stragglers: evaluates the rank work."""

    ranks: Ranks
    stragglers: Stragglers

    def collect(self, step: int, times: Times) -> dict[str, float]:
        """Metrics over all ranks since the last line. Collective: call it on all ranks at log lines."""
        device = self.ranks.device
        bytes_ = [memory.peak(device), memory.headroom(device), memory.retries(device)]
        rows = self.ranks.rows([*self.stragglers.rank_work(times), *bytes_])
        own = [row[: len(WORK)] for row in rows]
        waits, peaks, rooms, retries = zip(*([row[0], *row[len(WORK) :]] for row in rows), strict=True)
        found = {
            "data_wait_s_max": max(waits),
            "peak_memory_gib": max(peaks) / 2**30,
            "memory_headroom_gib": min(rooms) / 2**30,
            **self.stragglers.collect(step, times, own),
        }
        if device.type == "cuda":
            found["alloc_retries"] = sum(retries)
        return found
