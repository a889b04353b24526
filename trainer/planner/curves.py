"""Throughput over the number of GPUs: as rows, as shares, and as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from ...data.files import write_atomic
from ...recipes import Recipe
from ..flops import Part
from . import Row, plan
from .devices import Device
from .layout import LAYOUTS

CURVE = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of GPUs."""


def curves(parts: Sequence[Part], recipe: Recipe, device: Device | None) -> list[list[Row]]:
    """A curve a layout: every GPU keeps its micro-batch, one pass a step."""
    return [[plan(parts, recipe, count, device, layout, weak=True) for count in CURVE] for layout in LAYOUTS]


def fixed_batch(parts: Sequence[Part], recipe: Recipe, device: Device | None) -> list[Row]:
    """The curve of the recipe's own global batch, as far as it divides."""
    return [plan(parts, recipe, count, device) for count in CURVE if recipe.global_batch % count == 0]


def retention(curve: Sequence[Row]) -> list[float]:
    """Samples a second and GPU, over those of the first row."""
    a_gpu = [(row.samples_s or 0.0) / row.gpus for row in curve]
    return [value / a_gpu[0] for value in a_gpu]


def draw(parts: Sequence[Part], recipe: Recipe, device: Device, file: Path) -> None:
    """Throughput, and the share of it that a GPU keeps, as a PNG. The device must have `bf16_tflops`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    title = f"{recipe.name} on {device.name}, predicted: micro_batch {recipe.micro_batch}, one pass a step"
    figure.suptitle(title, fontsize=10)
    total, kept = figure.subplots(1, 2)
    styles = [
        # Curves lie on each other: the later ones are thinner, so that all are seen.
        *(
            (curve, curve[0].layout.name, {"linewidth": 9 - 1.2 * at})
            for at, curve in enumerate(curves(parts, recipe, device))
        ),
        (
            fixed_batch(parts, recipe, device),
            f"global_batch {recipe.global_batch} at all sizes",
            {"color": "black", "linestyle": ":"},
        ),
    ]
    for curve, name, style in styles:
        counts = [row.gpus for row in curve]
        total.plot(counts, [row.samples_s for row in curve], label=name, **style)
        kept.plot(counts, [100 * value for value in retention(curve)], **style)
    for axes, label in ((total, "samples/s"), (kept, "% of a GPU's throughput at 8")):
        axes.set(xscale="log", xlabel="GPUs", ylabel=label)
        axes.set_xticks(CURVE, [str(count) for count in CURVE])
        axes.minorticks_off()
        axes.grid(color="#e2e8f0")
    total.set_yscale("log")
    kept.set_ylim(0, 105)
    total.legend(frameon=False, fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(file, picture.getvalue())
