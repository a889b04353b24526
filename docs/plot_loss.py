"""Draws the loss of a run from its metrics file: `python docs/plot_loss.py runs/tiny-mllm/metrics.jsonl OUT.svg`."""

import io
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Text stays text and ids are fixed: the same numbers give the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "bifrost", "font.family": "sans-serif"}


def plot(metrics: Path, out: Path) -> None:
    """Write the curves of `loss` and `loss_masked` over the logged steps of `metrics` to `out`."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "event" not in record]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.4), facecolor="white")
        axes = figure.subplots()
        for key, label, colour in (("loss_masked", "hidden patches", "#d9882b"), ("loss", "all patches", "#2f6fb3")):
            axes.plot([s["step"] for s in steps], [s[key] for s in steps], color=colour, label=label, linewidth=1.8)
        axes.set(xlabel="step", ylabel="mean squared error", xlim=(0, steps[-1]["step"]))
        axes.grid(color="#e2e8f0")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    out.write_text("".join(line.rstrip() + "\n" for line in text.getvalue().splitlines()), encoding="utf-8")


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
