"""Writes the tables of docs/gpu.md: `python docs/make_gpu.py`. Predictions are the plan's; measurements those of
docs/benchmarks/results/device.json, which `make device` wrote on a GPU, if there is one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bifrost.recipes import load_recipe
from bifrost.trainer.planner import parts, plan, workload
from bifrost.trainer.planner.devices import find_device

PAGE = Path(__file__).with_name("gpu.md")
RESULTS = Path(__file__).with_name("benchmarks") / "results" / "device.json"
RECIPES = ("mllm-3b", "flux-controlnet")
DEVICE = "h200"


def predicted() -> str:
    """One GPU with one pass per step, as `bifrost bench engine --against-plan` compares it."""
    lines = [
        "| recipe | samples per step | step, s | samples/s | MFU | held, GB | peak, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in RECIPES:
        recipe = load_recipe(name)
        row = plan(parts(recipe), workload(recipe), 1, find_device(DEVICE), weak=True)
        assert row.times is not None and row.samples_s is not None
        memory = row.memory
        cells = [str(row.global_batch), f"{row.times.as_set:.3f}", f"{row.samples_s:.1f}", f"{row.times.mfu:.0%}"]
        cells += [f"{size / 1e9:.1f}" for size in (memory.static, memory.peak)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(results: dict[str, Any] | None) -> str:
    """Every part of `make device`, with its figures if the results are of a GPU."""
    sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))
    from device_parts import PARTS

    on_gpu = results is not None and results["device"] == "cuda"
    if on_gpu:
        about = f"{results['parts']['machine']['figures']['machine']}, {results['date']}."  # type: ignore[index]
    else:
        about = "**Nothing has been measured: no run on a GPU is recorded.**"
    lines = [about, "", "| part | shows | measured |", "|---|---|---|"]
    for part in PARTS:
        found = results["parts"].get(part.name, {}) if on_gpu else {}  # type: ignore[index]
        figures = "; ".join(f"{name} {value}" for name, value in found.get("figures", {}).items() if value is not None)
        if found.get("state") != "done":
            figures += f"{'; ' if figures else ''}{found['state']}: {found['reason']}" if found else "not measured"
        lines.append(f"| `{part.name}` | {part.shows} | {figures} |")
    return "\n".join(lines)


def page(text: str, results: dict[str, Any] | None) -> str:
    for name, content in (("predicted", predicted()), ("measured", measured(results))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(pattern, lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text, flags=re.DOTALL)
    return text


def recorded() -> dict[str, Any] | None:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), recorded()), encoding="utf-8")
