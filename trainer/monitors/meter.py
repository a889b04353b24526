"""Rates of the loop between two metric lines: samples and tokens a second, time spent waiting for data, memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from .sections import STEP, Times


class Meter:
    """Counts from one `rates` to the next. Work beside the steps, such as saves, does not dilute the rates."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._start()

    def _start(self) -> None:
        self._begun = time.perf_counter()
        self._steps = self._samples = 0
        self._tokens = 0.0

    def count(self, samples: int, tokens: float) -> None:
        """One step over `samples` samples and `tokens` text tokens and patches, of all ranks."""
        self._steps += 1
        self._samples += samples
        self._tokens += tokens

    def rates(self, times: Times) -> dict[str, float]:
        """Metrics since the last call, over which `times` were taken too. `data_wait_s`: this rank's seconds a step;
        `peak_memory_gib`: this rank's."""
        beside = sum(seconds for name, seconds in times.wall.items() if name not in STEP)
        elapsed = max(time.perf_counter() - self._begun - beside, 1e-9)
        steps = max(self._steps, 1)
        rates = {
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "step_s": elapsed / steps,
            "data_wait_s": times.wall.get("data", 0.0) / steps,
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        self._start()
        return rates


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at a time since the start: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The kernel counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
