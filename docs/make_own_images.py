"""Writes the table of docs/own-images.md: `python docs/make_own_images.py`. A test fails when it is out of date."""

from __future__ import annotations

from pathlib import Path

from bifrost.recipes import load_recipe
from bifrost.trainer.planner import parts, workload
from bifrost.trainer.planner.devices import find_device
from bifrost.trainer.planner.report import Report

PAGE = Path(__file__).with_name("own-images.md")
DEVICE, TEXT_TOKENS = "h100", 80
SIZES = {
    "mllm-3b": (8, 64),
    "mllm-3b-256": (256,),
    "mllm-7b": (8, 64),
    "mllm-7b-256": (256,),
    "mllm-7b-lora": (1, 8),
    "flux-controlnet": (8, 64),
    "flux-controlnet-256": (256,),
    "flux-controlnet-lora": (1, 8),
}
"""Every shipped recipe that needs GPUs -> numbers of them."""
SMALL = "tiny-mllm", "tiny-controlnet"


def table() -> str:
    """A row per recipe and number of GPUs, with the figures of `bifrost plan --json`."""
    small = " and ".join(f"{_samples(name):,}" for name in SMALL)
    rows = [
        "| recipe | H100 GPUs | GB of each | steps | hours | GPU-hours | images | frozen weights | checkpoints |\n",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
        f"| {', '.join(SMALL)} | none: two cores | | {' and '.join(f'{_steps(name):,}' for name in SMALL)} |"
        f" minutes, see [the demo](../README.md#the-demos-loss) | | {small} | part of the package | 0.2 GB |\n",
    ]
    for name, gpus in SIZES.items():
        recipe = load_recipe(name)
        samples = _samples(name)
        model = parts(recipe, TEXT_TOKENS)
        found = Report(recipe.name, model, workload(recipe), list(gpus), find_device(DEVICE), None).as_json(samples)
        kept = (recipe.checkpoint.keep + 1) * found["checkpoint_bytes"] / 1e9
        frozen = 2 * found["parameters"]["frozen"] / 1e9
        for row in found["rows"]:
            assert row["memory"]["fits"]
            rows.append(
                f"| {name} | {row['gpus']} | {row['memory']['peak'] / 1e9:.0f} | {recipe.steps:,} |"
                f" {row['cost']['hours']:.0f} | {row['cost']['gpu_hours']:.0f} | {samples / 1e6:.1f} million |"
                f" {frozen:.0f} GB | {kept:.0f} GB |\n"
            )
    return "".join(rows)


def _steps(name: str) -> int:
    return load_recipe(name).steps


def _samples(name: str) -> int:
    """Samples of a whole run."""
    recipe = load_recipe(name)
    return recipe.steps * recipe.global_batch


def page(text: str) -> str:
    """`text` with the table between its marks replaced."""
    begin, end = "<!-- requirements -->\n", "<!-- end of requirements -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    assert found and closed
    return before + begin + table() + end + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
