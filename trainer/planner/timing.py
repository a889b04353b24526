"""Step time on a device, and its utilisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .devices import Device
from .layout import Workload
from .optimizer import update_s
from .part import Part
from .traffic import Transfer


@dataclass(frozen=True)
class Timing:
    """Seconds per step on every GPU.

    ahead: transfers issued early enough to overlap computation; behind: the others. intra, inter: all transfers, by the
    links that bound them. at_peak, at_peak_done: useful and executed FLOPs at the device's peak.
    """

    compute: float
    ahead: float
    behind: float
    intra: float
    inter: float
    update: float
    data: float
    at_peak: float
    at_peak_done: float

    @property
    def serial(self) -> float:
        """Without any overlap."""
        return self.compute + self.ahead + self.behind + self.update + self.data

    @property
    def as_set(self) -> float:
        """Transfers issued ahead overlap computation, the loader overlaps everything."""
        return max(max(self.compute, self.ahead) + self.behind + self.update, self.data)

    @property
    def overlapped(self) -> float:
        """All transfers overlap computation."""
        return max(max(self.compute, self.ahead + self.behind) + self.update, self.data)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: useful FLOPs over the device's peak, for the step as set."""
        return self.at_peak / self.as_set

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: the same including recomputation."""
        return self.at_peak_done / self.as_set

    @property
    def bound(self) -> str:
        """The slowest of the activities that could overlap."""
        rates = {
            "compute": self.compute,
            "links within nodes": self.intra,
            "links between nodes": self.inter,
            "data": self.data,
        }
        return max(rates, key=lambda name: rates[name])


def working(parts: Iterable[Part]) -> list[Part]:
    """The parts that compute: all but cached ones."""
    return [part for part in parts if part.place != "cached"]


def useful_flops(parts: Iterable[Part]) -> float:
    """FLOPs per sample, forward and backward."""
    return sum(part.forward + part.backward for part in working(parts))


def done_flops(parts: Sequence[Part], recomputed: bool) -> float:
    """FLOPs per sample with recomputation."""
    again = sum(part.recomputed for part in working(parts)) if recomputed else 0.0
    return useful_flops(parts) + again


def compute_s(parts: Iterable[Part], recomputed: bool, device: Device) -> float:
    """Seconds per sample at the device's assumed efficiencies. The device must have `bf16_tflops`."""
    assert device.bf16_tflops is not None
    linear = attention = 0.0
    for part in working(parts):
        attention += part.attention + part.backward_attention
        linear += part.linear + part.backward - part.backward_attention
        if recomputed and part.layer:
            attention += part.attention
            linear += part.recomputed - part.attention
    slowed = linear / device.gemm_efficiency + attention / device.attention_efficiency
    return slowed / (device.bf16_tflops * 1e12)


def timing(
    parts: Sequence[Part],
    work: Workload,
    device: Device,
    transfers: Sequence[Transfer],
    gpus: int,
    micro_batch: int,
    passes: int,
) -> Timing:
    """Timing of `passes` passes over `micro_batch` samples on `gpus` GPUs. The device must have `bf16_tflops`."""
    assert device.bf16_tflops is not None
    samples = micro_batch * passes

    def seconds(some: Iterable[Transfer]) -> float:
        return sum(device.collective_s(one.bytes, one.count, one.ranks) for one in some)

    peak = device.bf16_tflops * 1e12
    return Timing(
        compute=samples * compute_s(parts, work.recomputed, device),
        ahead=seconds(one for one in transfers if one.hidden),
        behind=seconds(one for one in transfers if not one.hidden),
        intra=seconds(one for one in transfers if device.nodes(one.ranks) == 1),
        inter=seconds(one for one in transfers if device.nodes(one.ranks) > 1),
        update=update_s(parts, work.optimizer, gpus, device),
        data=samples / (max(work.workers, 1) * device.loader_samples_s),
        at_peak=samples * useful_flops(parts) / peak,
        at_peak_done=samples * done_flops(parts, work.recomputed) / peak,
    )
