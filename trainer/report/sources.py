"""The sources of a mixture on the page of a run."""

from __future__ import annotations

from .drawing import COLOURS, Chart, Curve, chart
from .summary import BASE, SOURCE, Summary

METRICS = ("samples", "epochs", "loss", "bad_fraction")
"""Of a source, as metric lines name them."""


def loss_chart(metrics: Summary) -> Chart | None:
    """The losses of the sources, of at most as many as there are colours; None without sources."""
    curves = [
        Curve(key.removeprefix(SOURCE), metrics.curves[key].smoothed(), colour)
        for key, colour in zip(metrics.sources, COLOURS, strict=False)
        if key in metrics.curves
    ]
    more = len(metrics.sources) - len(COLOURS)
    note = f" Without {more} more sources, which the table has." if more > 0 else ""
    return chart("loss of each source", curves, f"Smoothed over a twentieth of the lines.{note}", falls=True)


def base_chart(metrics: Summary) -> Chart | None:
    """The frozen base's losses on the understanding sources, of at most as many as there are colours; None without."""
    curves = [
        Curve(key.removeprefix(BASE), metrics.curves[key].smoothed(), colour)
        for key, colour in zip(metrics.bases, COLOURS, strict=False)
        if key in metrics.curves
    ]
    return chart("loss of the frozen base", curves, "On understanding sources; changes are changes of their data.")


def rows(metrics: Summary) -> list[list[str]]:
    """Name, samples, epochs, loss and unreadable samples of every source on the last metric line."""
    last, found = metrics.last or {}, []
    for name in (key.removeprefix(SOURCE) for key in last if key.startswith(SOURCE)):
        samples, epochs, loss, bad = (last.get(f"source_{each}_{name}") for each in METRICS)
        shown = "" if loss is None else f"{loss:.4g}"
        found.append([name, f"{samples:,}", f"{epochs:.3g}", shown, f"{bad:.3%}"])
    return found
