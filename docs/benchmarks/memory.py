"""Peak memory of a run of stage 2 on two ranks, of this checkout and of an earlier one, in alternating rounds.

    .venv/bin/python docs/benchmarks/memory.py --before FOLDER [--rounds 2]

FOLDER is a worktree of the earlier commit. Both read the same models: the tiny FLUX of this checkout, and one of random
weights of 4 double and 8 single blocks, width 512, 256 image and 128 text tokens. Prints a Markdown table of the peak
resident memory of the larger rank, and of the seconds of the fastest step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from startup import ROOT, measure, package, write_shards

FOUNDATIONS = ROOT / "recipes" / "foundations"
TEXT = 128
STEPS = 3
MICRO_BATCHES = {"tiny": (4, 16), "mid": (4,)}


def write_mid(folder: Path) -> None:
    """The tiny FLUX with a larger transformer of random weights, and longer captions."""
    shutil.copytree(FOUNDATIONS / "tiny-flux", folder)
    config = FluxTransformer2DModel.load_config(folder / "transformer")
    torch.manual_seed(0)
    made = FluxTransformer2DModel.from_config(
        {**config, "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8}
    )
    shutil.rmtree(folder / "transformer")
    made.to(torch.bfloat16).save_pretrained(folder / "transformer")
    settings = folder / "tokenizer_2" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": TEXT}))


def command(flux: Path, image_size: int, micro_batch: int) -> str:
    settings = {
        "backbone.path": FOUNDATIONS / "tiny",
        "flux.path": flux,
        "flux.image_size": image_size,
        "data.image_size": image_size * 7 // 4,
        "data.shards": "shards/train-*.tar",
        "data.workers": 0,
        "global_batch": 2 * micro_batch,
        "micro_batch": micro_batch,
        "steps": STEPS,
        "log_every": 1,
        "tracking.enabled": "false",
    }
    return " ".join(["train tiny-controlnet --ranks 2", *(f"{key}={value}" for key, value in settings.items())])


def run(arguments: str, checkout: Path, place: Path) -> tuple[float, float]:
    """Peak resident MiB of the larger rank, and seconds of the fastest step."""
    shutil.rmtree(place / "runs", ignore_errors=True)
    _, peak = measure(arguments, checkout, place)
    lines = map(json.loads, (place / "runs" / "tiny-controlnet" / "metrics.jsonl").read_text().splitlines())
    return peak, min(line["step_s"] for line in lines if "step_s" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="worktree of the earlier commit")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sides = [package(asked.before.resolve(), place / "before"), package(ROOT, place / "now")]
        write_shards(place / "shards")
        write_mid(place / "mid")
        models = {"tiny": (FOUNDATIONS / "tiny-flux", 64), "mid": (place / "mid", 128)}
        print(
            "| model | samples | before, MiB | now, MiB | before, s | now, s | ratio |\n|---|---|---|---|---|---|---|"
        )
        for label, (flux, image_size) in models.items():
            for samples in MICRO_BATCHES[label]:
                arguments = command(flux, image_size, samples)
                rounds = [[run(arguments, side, place) for side in sides] for _ in range(asked.rounds)]
                peaks = [statistics.median(found[side][0] for found in rounds) for side in (0, 1)]
                seconds = [statistics.median(found[side][1] for found in rounds) for side in (0, 1)]
                ratios = [before[1] / now[1] for before, now in rounds]
                cells = [label, samples, *(f"{peak:,.0f}" for peak in peaks), *(f"{spent:.2f}" for spent in seconds)]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"| {' | '.join(map(str, cells))} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
