"""Writes the demo's table into the README, from evaluations of the demo with several seeds:
`python docs/make_demo.py runs/demo runs/demo-1 runs/demo-2`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- scenes -->\n", "<!-- end of scenes -->"
CATEGORIES = {
    "single": "one",
    "two": "two",
    "position": "position",
    "count": "counting",
    "binding": "binding",
    "unseen_colour": "unseen colouring in a pair",
    "colour": "unseen colouring",
    "mixed": "mixed",
    "grid": "3 x 3",
    "phrasing": "unseen phrasing",
}
"""Category in metrics.json -> column. What is held out of them: docs/data.md."""
ROWS = {
    "**both stages**": ("both", "all"),
    "latents alone, FLUX's text empty": ("latents_alone", "all"),
    "stage 1 alone, by a linear probe": ("probe", "all"),
    "FLUX alone, by the caption": ("flux_alone", "all"),
    "FLUX alone: the right objects in any places": ("flux_alone", "set"),
    "true latents, FLUX's text empty: the ceiling": ("true_latents", "all"),
    "another scene's latents: that scene": ("swapped", "all"),
    "another scene's latents win against the caption": ("swapped", "latents_win"),
    "the caption wins against them": ("swapped", "caption_wins"),
    "both stages, captions shuffled: chance": ("shuffled", "all"),
    "the probe, captions shuffled": ("probe_shuffled", "all"),
    "true latents by the probe": ("probe_true", "all"),
}
"""Label -> control and its score; see docs/evaluation.md."""
Figures = dict[str, Any]


def main(folders: list[Path]) -> None:
    """Replace the table between the markers."""
    found = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    text = "\n".join([*table(found, "heldout"), "", *table(found, "seen"), ""])
    README.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


def table(found: list[Figures], part: str) -> list[str]:
    """The table of one part of the data: means over the seeds, and of both stages the lowest value too."""
    names = {name: label for name, label in CATEGORIES.items() if name in found[0]["scenes"][part]["both"]}
    numbers = [found[0]["scenes"][part]["both"][name]["n"] for name in names]
    title = "held out" if part == "heldout" else "seen in training"
    if part == "seen":
        names["colour"] = "one, coloured"
    lines = [f"| {title} | {' | '.join(names.values())} |", "|---|" + "---:|" * len(names)]
    lines += [f"| scenes | {' | '.join(map(str, numbers))} |"]
    for label, (control, score) in ROWS.items():
        values = [[each["scenes"][part][control][name][score] for each in found] for name in names]
        lines.append(_line(label, map(fmean, values)))
        if control == "both" and len(found) > 1:
            lines.append(_line(f"{label}, lowest of {len(found)} seeds", map(min, values)))
    return lines


def _line(label: str, values: Iterable[float]) -> str:
    return f"| {label} | {' | '.join(f'{value:.2f}' for value in values)} |"


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
