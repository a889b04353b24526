"""Writes the tables of docs/ablations.md: `python docs/make_ablations.py FOLDER…` adds what `bifrost ablate` found in
these folders, each named after its suite, to the records, and draws their plots; without one, the tables are written
from the records.

A suite may thus be run in parts, some seeds or questions at a time: a seed that was measured before keeps its figures,
and has to have the same ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from bifrost.recipes.suite import Suite, load_suite
from bifrost.slurm.io import write_json
from bifrost.trainer.ablation.plot import plot
from bifrost.trainer.ablation.table import Row, markdown, record

DOCS = Path(__file__).parent
PAGE = DOCS / "ablations.md"
RESULTS = DOCS / "benchmarks" / "results"
FIELDS = [field.name for field in fields(Row)]


def page(text: str) -> str:
    """`text` with a table in every place that has a record."""

    def filled(found: re.Match[str]) -> str:
        suite = load_suite(found[2])[1]
        return f"{found[1]}{markdown(suite, rows(place(found[2]))).strip()}\n{found[3]}"

    return re.sub(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", filled, text, flags=re.DOTALL)


def place(name: str) -> Path:
    return RESULTS / f"ablation-{name}.json"


def rows(file: Path) -> list[Row]:
    """The rows of a record; none without one."""
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    return [Row(**{field: row[field] for field in FIELDS}) for row in stored["rows"]]


def joined(suite: Suite, before: Iterable[Row], found: Iterable[Row]) -> list[Row]:
    """Rows with the seeds of both, in the order of the suite."""
    every = {(row.question, row.name): row for row in before}
    for row in found:
        known = every.get((row.question, row.name))
        every[row.question, row.name] = row if known is None else _joined(known, row)
    names = [(question, name) for question, asked in suite.questions.items() for name in asked.rows]
    return [every[name] for name in names if name in every]


def _joined(known: Row, found: Row) -> Row:
    values = dict(zip(known.seeds, known.values, strict=True)), dict(zip(found.seeds, found.values, strict=True))
    both = values[0].keys() & values[1].keys()
    if changed := [seed for seed in sorted(both) if abs(values[0][seed] - values[1][seed]) > 1e-9]:
        raise SystemExit(
            f"{known.question}, {known.name}, seed {changed[0]}: {values[1][changed[0]]:.4f} in the folder,"
            f" {values[0][changed[0]]:.4f} in the record; remove the row there to measure it again"
        )
    if values[1].keys() <= values[0].keys():
        return known
    if both and both != values[0].keys():
        raise SystemExit(f"{known.question}, {known.name}: the folder has seed {min(both)} again; leave it out there")
    if both:
        return found
    merged = dict(sorted((values[0] | values[1]).items()))
    weights = len(known.seeds), len(found.seeds)
    means = {
        name: (weights[0] * mean + weights[1] * found.categories[name]) / sum(weights)
        for name, mean in known.categories.items()
    }
    return Row(known.question, known.name, list(merged), list(merged.values()), means)


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        suite = load_suite(folder.name)[1]
        found = joined(suite, rows(place(folder.name)), rows(folder / "table.json"))
        write_json(place(folder.name), record(suite, found))
        (DOCS / f"ablation-{folder.name}.svg").write_bytes(plot(suite, found))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
