"""Throughput over the number of GPUs: as rows, as fractions, and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...data.atomic import write_atomic
from . import Row, plan
from .devices import Device
from .layout import LAYOUTS, Workload
from .part import Part

CURVE = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of GPUs."""


def curves(parts: Sequence[Part], work: Workload, device: Device | None) -> list[list[Row]]:
    """A weak-scaling curve per layout: every GPU has its micro-batch and one pass per step."""
    return [[plan(parts, work, count, device, layout, weak=True) for count in CURVE] for layout in LAYOUTS]


def fixed_batch(parts: Sequence[Part], work: Workload, device: Device | None) -> list[Row]:
    """The curve of the recipe's global batch, for the numbers of GPUs that divide it."""
    return [plan(parts, work, count, device) for count in CURVE if work.global_batch % count == 0]


SAME = 0.01
"""Relative difference below which two curves are drawn as one."""
MARKERS = "osD^vP*X<>"


def retention(curve: Sequence[Row]) -> list[float]:
    """Samples per second and GPU, relative to the first row."""
    per_gpu = [(row.samples_s or 0.0) / row.gpus for row in curve]
    return [value / per_gpu[0] for value in per_gpu]


def draw(name: str, parts: Sequence[Part], work: Workload, device: Device, file: Path) -> None:
    """Plot throughput, and the fraction of it retained per GPU, as a PNG. The device must have `bf16_tflops`.
    name: of the recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    title = f"{name} on {device.name}, predicted: micro_batch {work.micro_batch}, one pass per step"
    figure.suptitle(title, fontsize=10)
    rate, kept = figure.subplots(1, 2)
    lines = [
        (rows, name, {"marker": marker})
        for (rows, name), marker in zip(distinct(curves(parts, work, device)), MARKERS, strict=False)
    ]
    fixed = {"color": "black", "linestyle": ":", "marker": "."}
    lines.append((fixed_batch(parts, work, device), f"global_batch {work.global_batch} at all sizes", fixed))
    for rows, name, style in lines:
        counts = [row.gpus for row in rows]
        rate.plot(counts, [(row.samples_s or 0.0) / row.gpus for row in rows], label=name, **style)
        kept.plot(counts, [100 * value for value in retention(rows)], **style)
    for axes, label in ((rate, "samples/s per GPU"), (kept, "% of a GPU's throughput at 8 GPUs")):
        axes.set(xscale="log", xlabel="GPUs", ylabel=label)
        axes.set_xticks(CURVE, [str(count) for count in CURVE])
        axes.minorticks_off()
        axes.grid(color="#e2e8f0")
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomic(file, png.getvalue())


def distinct(found: Sequence[Sequence[Row]]) -> list[tuple[Sequence[Row], str]]:
    """Curves and names; visually identical curves are merged into one with all their names."""
    groups: list[list[Sequence[Row]]] = []
    for rows in found:
        rates = [row.samples_s or 0.0 for row in rows]
        for group in groups:
            first = [row.samples_s or 0.0 for row in group[0]]
            if all(abs(a - b) <= SAME * a for a, b in zip(first, rates, strict=True)):
                group.append(rows)
                break
        else:
            groups.append([rows])
    return [(group[0], "\n".join(rows[0].layout.name for rows in group)) for group in groups]
