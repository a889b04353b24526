"""Curves as SVG, for a page: small, without scripts, sharp at every size and in print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito's palette, distinguishable with colour blindness."""
WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
CHARACTER = 6.5
"""Width of a digit of a label, at most."""
EARLY = 0.03
"""Fraction of a long run's steps that a chart's axis may omit: the initial drop of the loss is uninformative."""
POINTS = 400
"""A curve of more points is drawn by the least and the most of each of half as many stretches."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """faint: drawn thin and light, behind the others and without a name of its own in the legend."""

    name: str
    points: Points
    colour: str
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, and a `note` below it."""

    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    """Name, colour."""
    note: str = ""


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Exponential mean over about a twentieth of the points, without a bias to the first."""
    keep = 1 - 1 / max(1.0, len(points) / 20)
    mean = weight = 0.0
    found = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def noisy(name: str, points: Points, colour: str) -> list[Curve]:
    """The curve smoothed, and faint behind it as it is."""
    return [Curve(name, points, colour, faint=True), Curve(name, smoothed(points), colour)]


def figure(
    title: str, curves: Iterable[Curve], note: str = "", zero: bool = False, falls: bool = False
) -> Figure | None:
    """A chart of the curves over the step; None when none has a point. zero: the axis begins at 0. It is logarithmic
    where all values are positive and span a factor of 50. falls: the first steps of a long run may leave the chart."""
    drawn = [Curve(c.name, [p for p in c.points if math.isfinite(p[1])], c.colour, c.faint) for c in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return None
    steps = [x for curve in drawn for x, _ in curve.points]
    left, right = min(steps), max(steps)
    early = left + EARLY * (right - left) if falls and len(drawn[0].points) > 100 else left
    values = [y for curve in drawn for x, y in curve.points if x >= early]
    low, high = min(values), max(values)
    logarithmic = not zero and low > 0 and high / low > 50
    ticks = _decades(low, high) if logarithmic else _ticks(0.0 if zero else low, high)
    low, high = min(ticks[0], low), max(ticks[-1], high)
    scale = math.log10 if logarithmic else float

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def down(y: float) -> float:
        share = (scale(y) - scale(low)) / (scale(high) - scale(low))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = []
    for tick in ticks:
        y = down(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(left, right):
        if left <= tick <= right and tick == int(tick):
            parts.append(_below(across(tick), short(tick)))
    # An inner SVG cuts off what leaves it.
    inside = LEFT - 2, TOP - 2, WIDTH - LEFT - RIGHT + 4, HEIGHT - TOP - BOTTOM + 4
    parts.append('<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">'.format(*inside))
    for curve in sorted(drawn, key=lambda curve: not curve.faint):
        style = f'stroke="{curve.colour}"' + (' stroke-width="1" opacity="0.35"' if curve.faint else "")
        places = [(across(x), down(y)) for x, y in thinned(curve.points)]
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{curve.colour}"/>')
        else:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="curve" {style} points="{line}"/>')
    label = escape(f"{title} over the step")
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    legend = [(curve.name, curve.colour) for curve in drawn if not curve.faint]
    return Figure(title, Markup(head + "".join(parts) + "</svg></svg>"), legend, note)


def _below(x: float, label: str) -> str:
    """A label under the axis at `x`, wholly inside of the chart."""
    half = CHARACTER * len(label) / 2
    anchor, place = ("end", WIDTH - 1.0) if x + half > WIDTH - 1 else ("middle", x)
    return f'<text x="{place:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{label}</text>'


def thinned(points: Points) -> Points:
    """The same curve in at most POINTS points: no peak is lost."""
    if len(points) <= POINTS:
        return points
    size = len(points) / (POINTS // 2)
    edges = [round(i * size) for i in range(POINTS // 2 + 1)]
    found = []
    for begin, end in pairwise(edges):
        stretch = points[begin:end]
        found += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return found


def bands(spans: Iterable[tuple[float, float, str, str]], height: int = 26, ticks: Iterable[float] = ()) -> Markup:
    """A strip as wide as the page of (begin, end, colour, what it is), all in shares of the width; ticks: lines at its
    lower edge."""
    parts = []
    for begin, end, colour, title in spans:
        wide = max(end - begin, 0.0005) * 1000
        shape = f'x="{begin * 1000:.2f}" width="{wide:.2f}" height="{height}" fill="{colour}"'
        parts.append(f"<rect {shape}><title>{escape(title)}</title></rect>")
    for tick in ticks:
        parts.append(f'<path class="tick" d="M{tick * 1000:.2f} {height - 9}V{height}"/>')
    view = f'viewBox="0 0 1000 {height}" preserveAspectRatio="none" height="{height}"'
    return Markup(f'<svg class="bands" {view} role="img">' + "".join(parts) + "</svg>")


def short(value: float) -> str:
    """The number in few characters: 12k, 0.25, 3e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 10 * limit or (size >= limit and value % (limit / 10) == 0):
            return f"{value / limit:.4g}{unit}"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about five."""
    if high <= low:
        low, high = low - abs(low) / 2 - 0.5 * (low == 0), high + abs(high) / 2 + 0.5 * (high == 0)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**i for i in range(first, last + 1, max(1, (last - first) // 4))]
