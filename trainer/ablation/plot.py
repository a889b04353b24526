"""The rows of a suite in one figure: a dot per seed, a line at the mean."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ...recipes.suite import Suite
from .table import Row

STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "bifrost", "font.family": "sans-serif", "font.size": 9}
"""Text stays text and ids are fixed: the same numbers give the same file."""
PAPER, OTHER = "#0072b2", "#d55e00"
ROW_INCHES = 0.26


def plot(suite: Suite, rows: Sequence[Row]) -> bytes:
    """SVG. The paper's choices have another colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heights, labels, at = [], [], 0.0
    for number, row in enumerate(rows):
        at += 1.0 if number == 0 or rows[number - 1].question == row.question else 1.8
        heights.append(at)
        labels.append(f"{row.question}: {row.name}")
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.8 + ROW_INCHES * at), facecolor="white", layout="constrained")
        axes = figure.subplots()
        for row, height in zip(rows, heights, strict=True):
            colour = PAPER if row.name == suite.questions[row.question].paper else OTHER
            axes.plot(row.values, [height] * len(row.values), "o", color=colour, markersize=4, alpha=0.6)
            axes.plot([row.mean] * 2, [height - 0.35, height + 0.35], color=colour, linewidth=1.8)
        axes.set_yticks(heights, labels)
        if suite.control == "reconstruction":
            axes.set(xlabel=f"{suite.categories[0]} of held-out images")
        else:
            axes.set(xlim=(-0.02, 1.02), xlabel="scenes with every object right, held-out combinations")
        axes.set(ylim=(at + 1, 0))
        axes.grid(axis="x", color="#e2e8f0")
        axes.spines[["top", "right", "left"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()).encode()
