"""Charts of a page: matplotlib's SVG, with text as text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .series import Series

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito's palette, distinguishable with colour blindness."""
STYLE: dict[Any, Any] = {
    "axes.formatter.limits": (-3, 5),
    "axes.edgecolor": "#e2e8f0",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 8,
    "grid.color": "#e2e8f0",
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "bifrost",
    "xtick.color": "#4a5568",
    "xtick.major.size": 0,
    "ytick.color": "#4a5568",
    "ytick.major.size": 0,
}
"""Ids depend only on the content, so that charts of one page can share them and equal runs have equal pages. A long
curve is simplified by at most half a point, which preserves its peaks."""
EARLY = 0.03
"""Fraction of a long run's steps that a chart's axis may omit: the initial drop of the loss is uninformative."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """faint: thin and light, behind the others and without an entry in the legend."""

    name: str
    points: Points
    colour: str
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with its heading, and a `note` below it."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    """Name, colour."""
    note: str = ""


def noisy(name: str, series: Series, colour: str) -> list[Curve]:
    """The smoothed curve, and the original faint behind it."""
    return [Curve(name, series.drawn(), colour, faint=True), Curve(name, series.smoothed(), colour)]


def chart(title: str, curves: Iterable[Curve], note: str = "", zero: bool = False, falls: bool = False) -> Chart | None:
    """The curves over the step; None if none has a point. zero: the axis begins at 0; else it is logarithmic if all
    values are positive and span a factor of 50. falls: the axis may omit values of a long run's first steps."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    drawn = [Curve(c.name, [p for p in c.points if math.isfinite(p[1])], c.colour, c.faint) for c in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return None
    steps = [x for curve in drawn for x, _ in curve.points]
    left, right = min(steps), max(steps)
    early = left + EARLY * (right - left) if falls and len(drawn[0].points) > 100 else left
    values = [y for curve in drawn for x, y in curve.points if x >= early]
    low, high = min(values), max(values)
    with rc_context(STYLE):
        figure = Figure(figsize=(4, 2.1), layout="constrained")
        axes = figure.subplots()
        for curve in sorted(drawn, key=lambda curve: not curve.faint):
            width, alpha = (0.8, 0.35) if curve.faint else (1.4, 1.0)
            marker = "o" if len(curve.points) == 1 else ""
            xs, ys = zip(*curve.points, strict=True)
            axes.plot(xs, ys, color=curve.colour, marker=marker, linewidth=width, alpha=alpha)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y")
        if zero:
            axes.set_ylim(bottom=0)
        elif low > 0 and high / low > 50:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        if early > left and low < high:
            axes.set_ylim(low, high)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = text.getvalue()
    legend = [(curve.name, curve.colour) for curve in drawn if not curve.faint]
    return Chart(title, Markup(svg[svg.index("<svg") :]), legend, note)
