"""Hardware utilisation: useful FLOPs per second, MFU and HFU, bandwidth of gathered weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..planner.devices import Device
from ..planner.layout import AS_SET, Workload
from ..planner.part import Part
from ..planner.timing import done_flops, useful_flops
from ..planner.traffic import traffic

TEXTS = (0.0, 100.0, 200.0)
"""Prompt lengths at which FLOPs are counted; because of attention they are quadratic in the length."""


class Utilisation:
    """counted: the model's parts for prompts of each of TEXTS. patches: per sample on average, included in the
    stage's token counts; 0 if FLOPs do not depend on the text. node: ranks per host. device: None for unknown hardware,
    without MFU.
    """

    def __init__(
        self,
        counted: Sequence[Sequence[Part]],
        work: Workload,
        ranks: int,
        node: int,
        patches: float,
        device: Device | None,
    ) -> None:
        self.ranks, self.patches = ranks, patches
        self._useful = np.polyfit(TEXTS, [useful_flops(each) for each in counted], 2)
        self._done = np.polyfit(TEXTS, [done_flops(each, work.recomputed) for each in counted], 2)
        self.peak = None
        if device is not None and device.bf16_tflops is not None and work.zero.weight_bytes == 2:
            self.peak = device.bf16_tflops * 1e12
        passes = work.global_batch // (work.micro_batch * ranks)
        moved = traffic(counted[0], work.zero, AS_SET, ranks, node, passes)
        self.gathered = sum(one.bytes for one in moved if one.kind.startswith("gather"))
        """Bytes of weights that a rank receives per step."""

    def flops(self, tokens: float) -> tuple[float, float]:
        """FLOPs of a sample of `tokens` text tokens and patches: useful, and including recomputation."""
        text = max(tokens - self.patches, 0.0)
        return float(np.polyval(self._useful, text)), float(np.polyval(self._done, text))

    def rates(self, samples_per_s: float, tokens_per_s: float, step_s: float) -> dict[str, float]:
        """Metrics from the total rates of all ranks. Uses the mean prompt length: the error is that of attention within
        the prompt, a ten-thousandth of the total."""
        useful, done = self.flops(tokens_per_s / samples_per_s if samples_per_s else 0.0)
        a_device = samples_per_s / self.ranks
        found = {"tflops_per_device": useful * a_device / 1e12}
        if self.peak is not None:
            found |= {"mfu": useful * a_device / self.peak, "hfu": done * a_device / self.peak}
        if self.gathered:
            found["allgather_gb_per_s"] = self.gathered / step_s / 1e9
        return found
