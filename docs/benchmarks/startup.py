"""CPU seconds and peak memory of commands, of this checkout and of an earlier one, in alternating rounds.

    .venv/bin/python docs/benchmarks/startup.py --before FOLDER [--rounds 5] [--lines 1000000]

FOLDER is a worktree of the earlier commit. Prints a Markdown table: per command the median of user + system seconds of
all its processes, in brackets the lowest and the highest, and the peak of the resident memory of the largest. `train`
runs two ranks to the end of the first step, its save included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from bifrost.data import write_shard

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "data", "recipes", "slurm", "trainer")
ONE_STEP = ("data.shards=shards/train-*.tar", "global_batch=8", "micro_batch=4", "steps=1", "tracking.enabled=false")
TRAIN = f"train tiny-mllm --ranks 2 {' '.join(ONE_STEP)}"
COMMANDS = (
    "--help",
    "plan mllm-7b --gpus 8 --device h200",
    "plan flux-controlnet --gpus 8 --device h200",
    "train tiny-mllm --dry-run",
    "checkpoint list runs/tiny-mllm",
    TRAIN,
)
ON_METRICS = ("report one", "compare one two", "goodput one")
METRICS = ("loss", "loss_masked", "grad_norm", "lr", "samples_per_s", "tokens_per_s", "tflops_per_device", "ettr")


def package(checkout: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH with `bifrost` from a checkout."""
    (folder / "bifrost").mkdir(parents=True)
    for name in PACKAGES:
        (folder / "bifrost" / name).symlink_to(checkout / name)
    for file in (checkout / "package").glob("*.py"):
        (folder / "bifrost" / file.name).symlink_to(file)
    return folder


def write_run(folder: Path, lines: int, seed: int) -> None:
    """A run folder with a metrics file of `lines` metric lines."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\n")
    draw = random.Random(seed)
    start = {"time": 0.0, "event": "start", "step": 0, "ranks": 8, "micro_batch": 4, "startup_s": 30.0}
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
        for step in range(1, lines + 1):
            line = {"time": 30 + 1.1 * step, "step": step, "batch": step, "samples": 8 * step, "slowest_rank": step % 8}
            line |= {
                "step_s": 1 + draw.random() / 10,
                "data_wait_s": draw.random() / 50,
                "data_digest": f"2:{step:016x}",
            }
            file.write(json.dumps(line | {name: draw.random() for name in METRICS}) + "\n")


def write_shards(folder: Path) -> None:
    """Four shards of image-caption pairs."""
    for number in range(4):
        samples = []
        for index in range(16):
            file = io.BytesIO()
            Image.new("RGB", (112, 112), (16 * index, 64 * number, 0)).save(file, "PNG")
            samples.append((f"square-{number}-{index}", {"png": file.getvalue(), "txt": b"a square"}))
        write_shard(folder / f"train-{number:05d}.tar", samples)


def measure(command: str, path: Path, folder: Path) -> tuple[float, float]:
    """User + system seconds, and peak resident MiB, of a command run in `folder` with the package in `path`."""
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'bifrost', *sys.argv[1:]], stdout=subprocess.DEVNULL)\n"
        "_, status, used = os.wait4(child.pid, 0)\n"
        "assert not status, status\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds, mebibytes = map(float, ended.stdout.split())
    return seconds, mebibytes


def again(command: str, side: int) -> str:
    """The command, with a run of its own for each checkout if it trains."""
    return f"{command} name=run-{side}" if command == TRAIN else command


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="worktree of the earlier commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--lines", type=int, default=1_000_000, help="of each metrics file; 0: commands without one only"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        paths = [package(asked.before.resolve(), place / "before"), package(ROOT, place / "now")]
        commands = list(COMMANDS)
        write_shards(place / "shards")
        measure(TRAIN, paths[1], place)  # fills the caches of files, and makes a checkpoint to list
        if asked.lines:
            commands += ON_METRICS
            for seed, run in enumerate(("one", "two")):
                write_run(place / run, asked.lines, seed)
        print("| command | before, s | now, s | before, MiB | now, MiB |\n|---|---|---|---|---|")
        for command in commands:
            rounds = 1 if command in ON_METRICS else asked.rounds
            found = []
            for _ in range(rounds):
                if command == TRAIN:
                    shutil.rmtree(place / "runs")
                found.append([measure(again(command, side), path, place) for side, path in enumerate(paths)])
            seconds = [[each[side][0] for each in found] for side in (0, 1)]
            shown = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in seconds]
            peaks = [f"{max(each[side][1] for each in found):,.0f}" for side in (0, 1)]
            print(f"| `bifrost {command}` | {shown[0]} | {shown[1]} | {peaks[0]} | {peaks[1]} |", flush=True)


if __name__ == "__main__":
    main()
