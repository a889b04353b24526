"""Throughput between two metric lines: samples and tokens per second, time spent waiting for data."""

from __future__ import annotations

import time

from .phase_timer import STEP, Times


class Meter:
    """Counts between calls of `rates`. Work outside the steps, such as saves, does not lower the rates."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._begun = time.perf_counter()
        self._steps = self._samples = 0
        self._tokens = 0.0

    def count(self, samples: int, tokens: float) -> None:
        """Count one step over `samples` samples and `tokens` text tokens and patches of all ranks."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens

    def rates(self, times: Times) -> dict[str, float]:
        """Metrics since the last call. times: of the same period. `data_wait_s`: this rank's seconds per step."""
        outside = sum(seconds for name, seconds in times.wall.items() if name not in STEP)
        elapsed = max(time.perf_counter() - self._begun - outside, 1e-9)
        steps = max(self._steps, 1)
        rates = {
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "step_s": elapsed / steps,
            "data_wait_s": times.wall.get("data", 0.0) / steps,
        }
        self._start()
        return rates
