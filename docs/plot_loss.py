"""Draws the loss of a run from its metrics file, and where attempts were lost:
`python docs/plot_loss.py runs/tiny-mllm/metrics.jsonl OUT.svg [METRICS-OF-AN-UNDISTURBED-RUN]`."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Text stays text and ids are fixed: the same numbers give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bifrost", "font.family": "sans-serif"}
CURVES = {
    "loss_masked": ("hidden patches", "#d9882b"),
    "loss": ("all patches", "#2f6fb3"),
    "val_loss_ema": ("hidden patches of held-out scenes, averaged weights", "#3b8f4f"),
}
"""Metric -> label and colour."""


def plot(metrics: Path, out: Path, undisturbed: Path | None = None) -> None:
    """Write the curves of `metrics` to `out`; with the losses of an `undisturbed` run as dots."""
    steps, starts = read(metrics)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.4), facecolor="white")
        axes = figure.subplots()
        for key, (label, colour) in CURVES.items():
            axes.plot(*points(steps, key), color=colour, label=label, linewidth=1.8)
        if undisturbed is not None:
            for key in ("loss_masked", "loss"):
                axes.plot(*points(read(undisturbed)[0], key), ".", color="#222222", markersize=4)
            axes.plot([], [], ".", color="#222222", markersize=4, label="a run that was not killed")
        for start in starts:
            lost, resumed = start["step"] + start["lost_steps"], start["step"]
            axes.axvspan(resumed, lost, color="#e9c7c7", linewidth=0)
            axes.axvline(lost, color="#b3261e", linewidth=1.2)
            axes.annotate(
                f"killed after step {lost},\nresumed from {resumed}",
                (lost, 0.97),
                (4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=9,
                color="#b3261e",
            )
        axes.set(xlabel="step", ylabel="mean squared error", xlim=(0, steps[-1]["step"]))
        axes.grid(color="#e2e8f0")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    out.write_text("".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()), encoding="utf-8")


def read(metrics: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step lines of a metrics file, and the starts of attempts that repeat steps of the one before."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    starts = [record for record in records if record.get("event") == "start" and record["lost_steps"]]
    return [record for record in records if "event" not in record], starts


def points(steps: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps that have a metric, and its values."""
    found = [(record["step"], record[key]) for record in steps if key in record]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    plot(*map(Path, sys.argv[1:]))
