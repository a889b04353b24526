"""Counts every shipped recipe on the phantom GPU and writes the table of docs/plan.md that compares them with the plan:
`python docs/make_counts.py`, or only those of its arguments. The table has the plan's figures as they are now."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bifrost.recipes import load_recipe, shipped_recipes
from bifrost.trainer.phantom.check import Row, count, engine_problems, held_row, pass_problems, pass_rows
from bifrost.trainer.planner import parts, workload

DOCS = Path(__file__).parent
PAGE = DOCS / "plan.md"
COUNTS = DOCS / "benchmarks" / "results" / "phantom.json"
RECIPES = list(shipped_recipes())
GPUS = {"tiny": (8,), "256": (8,)}
"""Of a recipe whose name begins or ends with it; of the others, those of `LARGE`."""
LARGE = (8, 64)
TEXT = {"tiny-mllm": 64}
"""Tokens of a prompt, if not 80."""
RECOMPUTED = "activation_checkpointing=true"
SAMPLES = 256 * 16
"""Samples of a step that every number of ranks divides; no figure here depends on it."""


def gpus(name: str) -> tuple[int, ...]:
    return next((found for part, found in GPUS.items() if part in (name.split("-")[0], name.split("-")[-1])), LARGE)


def counted(name: str) -> dict[str, Any]:
    """The counts of one recipe: a pass as it is and with activation checkpointing, the engine on numbers of ranks."""
    text = TEXT.get(name, 80)
    engine = {str(n): count(name, [f"global_batch={SAMPLES}"], text, n) for n in gpus(name)}
    return {"pass": count(name, [], text), "recomputed": count(name, [RECOMPUTED], text), "engine": engine}


def rows(name: str, counts: dict[str, Any]) -> dict[str, list[Row]]:
    """Row of the table -> figures planned by this version and counted."""
    found, text = {}, TEXT.get(name, 80)
    for title, key, overrides in ((name, "pass", []), ("with checkpointing", "recomputed", [RECOMPUTED])):
        recipe = load_recipe(name, overrides)
        found[title] = pass_rows(parts(recipe, text, text), workload(recipe), counts[key])
    recipe = load_recipe(name, [f"global_batch={SAMPLES}"])
    planned = parts(recipe, text), workload(recipe)
    found[name] += [held_row(*planned, int(n), each) for n, each in counts["engine"].items()]
    return found


def problems(counts: dict[str, Any]) -> list[str]:
    found = pass_problems(counts["pass"]) + pass_problems(counts["recomputed"])
    return found + [line for each in counts["engine"].values() for line in engine_problems(each)]


def table(counts: dict[str, Any]) -> str:
    lines = [
        "| counted / planned | TFLOP per sample | kept per sample, GB | peak of a pass, GB | held by the engine, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in counts:
        for title, found in rows(name, counts[name]).items():
            held = [row for row in found if row.what.startswith("held")]
            figures = [cell(row) for row in found if row not in held]
            figures += ["below 0.1"] * (3 - len(figures))
            figures.append("<br>".join(f"{row.what.removeprefix('held on ')}: {cell(row)}" for row in held))
            lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines)


def cell(row: Row) -> str:
    scale = 1e12 if row.unit == "TFLOP" else 1e9
    return f"{row.counted / scale:.4g} / {row.planned / scale:.4g} ({row.difference:+.1%})"


def page(text: str) -> str:
    """`text` with the table in its place."""
    content = table(recorded())
    pattern = r"(<!-- counted -->\n).*?(<!-- end of counted -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)


def recorded() -> dict[str, Any]:
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}


def record(name: str) -> None:
    found = counted(name)  # takes minutes: read afterwards what others have recorded meanwhile
    COUNTS.write_text(json.dumps(dict(sorted({**recorded(), name: found}.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for recipe in sys.argv[1:] or RECIPES:
        record(recipe)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
