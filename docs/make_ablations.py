"""Writes the tables of docs/ablations.md: `python docs/make_ablations.py FOLDER…` records what `bifrost ablate` found
in these folders, each named after its suite, and its plot; without one, the tables are written from the records."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from bifrost.recipes.suite import load_suite
from bifrost.trainer.ablation.table import Row, markdown

DOCS = Path(__file__).parent
PAGE = DOCS / "ablations.md"
RESULTS = DOCS / "benchmarks" / "results"


def page(text: str) -> str:
    """`text` with a table in every place that has a record."""

    def filled(found: re.Match[str]) -> str:
        return f"{found[1]}{table(found[2])}\n{found[3]}"

    return re.sub(r"(<!-- results of (\S+) -->\n).*?(<!-- end of results -->)", filled, text, flags=re.DOTALL)


def table(name: str) -> str:
    names = [field.name for field in fields(Row)]
    record: dict[str, Any] = json.loads(place(name).read_text(encoding="utf-8"))
    rows = [Row(**{field: row[field] for field in names}) for row in record["rows"]]
    return markdown(load_suite(name)[1], rows).strip()


def place(name: str) -> Path:
    return RESULTS / f"ablation-{name}.json"


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        shutil.copyfile(folder / "table.json", place(folder.name))
        shutil.copyfile(folder / "plot.svg", DOCS / f"ablation-{folder.name}.svg")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
