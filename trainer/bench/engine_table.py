"""Measurements of steps under the engine, and the plan's figures, as a record and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..planner import Row
from ..planner.devices import Device
from .machine import format_machine


@dataclass(frozen=True)
class Measured:
    """Medians over the steps, with the shortest and the longest step. Bytes are those of the rank with most of them.
    None where this machine has no such figure."""

    step_s: float
    least_step_s: float
    most_step_s: float
    parts_s: dict[str, float]
    """Seconds of forward and backward pass, of the exchange with its wait for the device, and of the update."""
    samples_s: float
    """Samples per second of all ranks."""
    mfu: float | None
    hfu: float | None
    startup_s: float
    """Building, loading and DeepSpeed's initialisation."""
    held_bytes: int
    peak_bytes: int | None
    alloc_retries: int | None
    launches: int | None
    """Kernels per step; without a GPU, calls of torch's operators."""

    @classmethod
    def of(
        cls,
        times: Sequence[dict[str, float]],
        samples: int,
        flops: tuple[float, float],
        device: Device | None,
        **rest: Any,
    ) -> Measured:
        """times: seconds of each part of every step. samples: per step, of all ranks. flops: per step and rank, useful
        and executed. device: with a peak, else no utilisation. rest: the fields from `startup_s` on."""
        steps = [sum(each.values()) for each in times]
        median = statistics.median(steps)
        peak = device.bf16_tflops * 1e12 if device and device.bf16_tflops else None
        mfu, hfu = (count / median / peak if peak else None for count in flops)
        parts = {name: statistics.median(each[name] for each in times) for name in times[0]}
        return cls(median, min(steps), max(steps), parts, samples / median, mfu, hfu, **rest)


@dataclass(frozen=True)
class Planned:
    """The plan's figures of the same names; times only for a known device."""

    step_s: float | None
    samples_s: float | None
    mfu: float | None
    hfu: float | None
    held_bytes: float
    peak_bytes: float

    @classmethod
    def of(cls, row: Row) -> Planned:
        times = row.times
        step_s, mfu, hfu = (times.as_set, times.mfu, times.hfu) if times else (None, None, None)
        return cls(step_s, row.samples_s, mfu, hfu, row.memory.static, row.memory.peak)


FIGURES = (
    ("step, s", "step_s", 1, ".4f"),
    ("shortest step, s", "least_step_s", 1, ".4f"),
    ("longest step, s", "most_step_s", 1, ".4f"),
    ("samples/s", "samples_s", 1, ",.1f"),
    ("MFU", "mfu", 1, ".1%"),
    ("HFU", "hfu", 1, ".1%"),
    ("held, GB", "held_bytes", 1e-9, ".4f"),
    ("peak, GB", "peak_bytes", 1e-9, ".4f"),
    ("launches per step", "launches", 1, ",.0f"),
    ("allocator retries", "alloc_retries", 1, ".0f"),
    ("startup, s", "startup_s", 1, ".1f"),
)
"""Row of the table: name, field, factor, format."""


def table(record: dict[str, Any], measured: Measured, planned: Planned | None) -> str:
    """The figures of a record; planned: for a second column, and the ratio of both."""
    layers = record["layers"]
    size = f"{layers} layers" if isinstance(layers, int) else f"{layers[0]} double and {layers[1]} single blocks"
    ranks, samples = record["ranks"], record["micro_batch"]
    lines = [
        f"{record['recipe']}: {size}, width {record['width']}, {record['weights']} weights; {ranks} x {samples} ="
        f" {ranks * samples} samples per step, {record['text_tokens']} text tokens; {record['precision']} on"
        f" {record['device']}, checkpointing {'on' if record['activation_checkpointing'] else 'off'};"
        f" {', '.join(record['kernels'].values())}",
        f"{format_machine(record['machine'])}; {record['date']}; median of {record['steps']} steps",
        "",
        f"{'':<18} {'measured':>12}" + (f" {'planned':>12} {'ratio':>7}" if planned else ""),
    ]
    for name, field, factor, form in FIGURES:
        ours, theirs = getattr(measured, field), getattr(planned, field, None)
        line = f"{name:<18} {_shown(ours, factor, form):>12}"
        if planned:
            ratio = ours / theirs if ours is not None and theirs else None
            line += f" {_shown(theirs, factor, form):>12} {_shown(ratio, 1, '.2f'):>7}"
        lines.append(line.rstrip())
    whole = sum(measured.parts_s.values())
    lines += ["", ", ".join(f"{name} {spent / whole:.1%}" for name, spent in measured.parts_s.items())]
    if record["device"] == "cpu":
        lines.append("On a CPU: launches are calls of torch's operators; there is no peak of an allocator.")
    if record["device"] == "phantom":
        lines.append("On a phantom device nothing is computed: times mean nothing.")
    return "\n".join(lines)


def _shown(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else format(value * factor, form)
