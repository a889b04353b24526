"""The parts of `device.py` that no command of its own covers: `python device_work.py NAME FOLDER full|reduced SHARDS`.

Each writes its figures to FOLDER/figures.json, and raises SystemExit with a line if they are wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("global_batch=16", "micro_batch=8", "log_every=1", "data.workers=1", "tracking.enabled=false")
STEPS, SAVED, KILLED = 12, 4, 6
"""Steps of the resumed run, steps between its saves, and the step after which it is killed."""


def machine(folder: Path, full: bool, shards: str) -> dict[str, Any]:
    """Versions, and the roofline that the kernels' benchmark measures."""
    import torch

    from bifrost.kernels.bench.measure import clock, roofline
    from bifrost.trainer.bench.machine import device_kind, format_machine
    from bifrost.trainer.bench.machine import machine as this_machine

    device = torch.device("cuda" if full else "cpu")
    found: dict[str, Any] = {
        "machine": format_machine(this_machine("triton", "transformers", "deepspeed", "liger-kernel")),
        "device": device_kind(),
    }
    if full:
        free, total = torch.cuda.mem_get_info()
        found |= {"free, GB": round(free / 1e9, 1), "total, GB": round(total / 1e9, 1), "CUDA": torch.version.cuda}
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    tflops, gbps = roofline(torch.bfloat16, device, 100 if full else 5)
    found |= {"GEMM, TFLOP/s": round(tflops, 4), "copy, GB/s": round(gbps, 1), "clock": str(clock(device) or "-")}
    return found


def resume(folder: Path, full: bool, shards: str) -> dict[str, Any]:
    """A run that is not disturbed, and one that is killed and resumed: metrics and checkpoints equal to the bit."""
    for name in ("whole", "killed"):
        train = [*command("train", "tiny-mllm", "--ranks", "1"), f"name={name}", f"steps={STEPS}", *SMALL]
        train += [f"data.shards={shards}", f"runs_dir={folder / 'runs'}", f"checkpoint.every={SAVED}"]
        train += ["kernels.deterministic=true", "optimizer.warmup_steps=2"]
        if name == "killed":
            kill = [sys.executable, str(ROOT / "examples" / "kill_at_step.py"), str(folder / "runs" / name)]
            subprocess.run([*kill, str(KILLED), *train], check=True)
        subprocess.run(train, check=True)
    whole, killed = (lines(folder / "runs" / name) for name in ("whole", "killed"))
    attempts = len([line for line in killed if line.get("event") == "start"])
    if attempts != 2:
        raise SystemExit(f"the killed run had {attempts} attempts, expected 2")
    for key in ("loss", "grad_norm", "data_digest"):
        values = [[line[key] for line in each if "event" not in line] for each in (whole, killed)]
        if values[0] != values[1] or len(values[0]) != STEPS:
            raise SystemExit(f"{key} differs between the runs: {values[0]} and {values[1]}")
    if (own := tensors(folder / "runs" / "whole")) != tensors(folder / "runs" / "killed"):
        raise SystemExit("the last checkpoints differ")
    saves = [line for line in killed if line.get("event") == "checkpoint"]
    return {
        "equal steps": STEPS,
        "equal files": len(own),
        "save, s": round(saves[-1]["seconds"], 3),
        "blocked, s": round(saves[-1]["blocked_s"], 3),
        "bytes": saves[-1]["bytes"],
    }


def decode(folder: Path, full: bool, shards: str) -> dict[str, Any]:
    """Masked decoding of one batch with random weights."""
    import torch

    from bifrost.kernels import PrefixLayout
    from bifrost.recipes import load_recipe
    from bifrost.trainer.bench.random_weights import randomised
    from bifrost.trainer.bench.routed import Clock
    from bifrost.trainer.bench.shapes import built
    from bifrost.trainer.inference.masked_decoding import decode as decoded
    from bifrost.trainer.inference.masked_decoding import draw_orders
    from bifrost.trainer.stages import open_stage

    device, samples, steps, text = torch.device("cuda" if full else "cpu"), 16 if full else 2, 16 if full else 4, 80
    stage: Any = randomised(open_stage(load_recipe("mllm-3b" if full else "tiny-mllm"), for_counting=True))  # type: ignore[arg-type]
    work, _ = stage.kernel_work(samples, "bf16")
    stage.kernels = type(stage.kernels)(attention=work.fastest_attention(device).provider)
    model: Any = built(stage.build, device, torch.bfloat16)
    stage.load(model)
    layout = PrefixLayout.of((text,) * samples, stage.tokens_per_image, device, 1)
    ids = torch.randint(0, stage.config.text_config.vocab_size, (samples * text,), device=device)
    orders = draw_orders(range(samples), stage.tokens_per_image).to(device)
    for _ in range(2):  # the first builds and allocates
        clock = Clock(device)
        prefix = model.backbone.prefix(ids, layout)
        clock("prefix")
        latents = decoded(model.branch, model.head, prefix, orders, steps)
        clock("decoding")
    seconds = clock.seconds()
    if not bool(latents.isfinite().all()):
        raise SystemExit("the latents are not finite")
    return {
        "images": samples,
        "decoding steps": steps,
        "images/s": round(samples / sum(seconds.values()), 3),
        "prefix, s": round(seconds["prefix"], 5),
        "per decoding step, s": round(seconds["decoding"] / steps, 5),
    }


def generate(folder: Path, full: bool, shards: str) -> dict[str, Any]:
    """Two steps of stage 2, then images through it and through the run of `resume`. Not by `bifrost generate`, whose
    contact sheet takes its font from matplotlib: its wheels would exceed what may be carried."""
    from bifrost.trainer.inference.generator import Generator

    mllm = folder.parent / "resume" / "runs" / "whole"
    if not mllm.is_dir():
        raise SystemExit("needs the run of the part resume")
    controlnet = ["train", "tiny-controlnet", "--ranks", "1", "steps=2", *SMALL, f"data.shards={shards}"]
    subprocess.run(command(*controlnet, f"runs_dir={folder / 'runs'}"), check=True)
    begun = time.monotonic()
    generator = Generator.load(mllm, folder / "runs" / "tiny-controlnet")
    loaded = time.monotonic()
    images = generator.generate(["a red car and a blue heart", "two owls above a moon"], [0, 1])
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        if not image.getbbox() or len(image.getcolors(image.width * image.height) or ()) < 2:
            raise SystemExit(f"image {number} has a single colour")
    times = {"load, s": loaded - begun, "generate, s": time.monotonic() - loaded}
    return {"images": len(images), **{name: round(seconds, 1) for name, seconds in times.items()}}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "bifrost.trainer", *words]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def tensors(run: Path) -> dict[str, Any]:
    """Name -> hashes of the files with tensors in the last checkpoint."""
    folder = max((run / "checkpoints").glob("step-*"))
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".safetensors")}


if __name__ == "__main__":
    name, folder, size, shards = sys.argv[1:]
    works = {each.__name__: each for each in (machine, resume, decode, generate)}
    result = works[name](Path(folder), size == "full", shards)
    (Path(folder) / "figures.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
