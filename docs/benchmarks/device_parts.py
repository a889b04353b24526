"""The parts of `device.py`: what each runs on a GPU and, at reduced size, elsewhere, and the figures that it gives."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("package", "kernels", "data", "recipes", "slurm", "trainer")
SMALL_BUCKET = "zero.reduce_bucket=1000000"
WORK = Path(__file__).with_name("device_work.py")
GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_attention.py")
PLAIN_TESTS = ("tests/kernels/test_attention.py", "tests/kernels/test_dense_attention.py")
"""Without Triton's interpreter, which in Triton 3.6 fails with NumPy 2.5."""
HOST_TESTS = ("tests/trainer/training/test_host_syncs.py", "tests/trainer/models/test_elementwise.py")


@dataclass
class Context:
    """folder: of all parts. wheels: of `make device-wheels`. checkout: its fingerprint. kind: of the device, known once
    the package is installed."""

    folder: Path
    wheels: Path
    checkout: str = ""
    kind: str = "unknown"

    @property
    def full(self) -> bool:
        """Whether the sizes are the real ones."""
        return self.kind == "cuda"

    @property
    def site(self) -> Path:
        """Where the package is installed."""
        return self.folder / "site"

    @property
    def shards(self) -> str:
        return str(self.wheels / "shards" / "train-*.tar")

    def environment(self) -> dict[str, str]:
        """Of a part. On a GPU kernels are compiled; elsewhere Triton's interpreter is chosen when they are imported."""
        compiled = {"TRITON_INTERPRET": "0"} if self.full else {}
        own = {"PYTHONPATH": str(self.site), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", **compiled}
        return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **own}


def fingerprint(wheels: Path) -> str:
    """Of what is installed: the package's files, and the names of the wheels."""
    names = sorted(wheel.name for wheel in wheels.glob("*.whl"))
    digest = hashlib.sha256("\n".join(names).encode())
    for folder in PACKAGES:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


Command = Callable[[Context, Path], "list[str] | str"]
"""The command of a part, which writes into the given folder; or why it cannot run, as a sentence."""


@dataclass(frozen=True)
class Part:
    name: str
    limit_s: float
    """On a GPU, where it should take half as long."""
    shows: str
    command: Command
    figures: Callable[[Path], dict[str, Any]]
    """From the files in the part's folder: name of a figure -> number or text."""


def bifrost(*words: str) -> list[str]:
    return [sys.executable, "-m", "bifrost.trainer", *words]


def install(context: Context, folder: Path) -> list[str]:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-compile"]
    # Without an index, nothing can come from anywhere but the wheels.
    options += ["--no-index", "--upgrade", "--target", str(context.site)]
    wheels = [str(wheel) for wheel in sorted(context.wheels.glob("*.whl")) if is_missing(wheel.name.partition("-")[0])]
    return [sys.executable, "-m", "pip", "install", *options, str(ROOT), *wheels]


def is_missing(distribution: str) -> bool:
    """Whether this interpreter has no version of a package; its own fits its torch at least as well as a wheel."""
    try:
        return not importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return True


def tests(files: tuple[str, ...], reduced: tuple[str, ...], workers: int) -> Command:
    """pytest of the GPU tests in `files`; elsewhere of the tests in `reduced`."""

    def command(context: Context, folder: Path) -> list[str]:
        chosen = [*files, "-m", "gpu", "-n", str(workers)] if context.full else [*reduced, "-n", "2"]
        options = ["-p", "no:cacheprovider", f"--junitxml={folder / 'tests.xml'}"]
        return [sys.executable, "-m", "pytest", *chosen, *options]

    return command


def kernels(*words: str) -> Command:
    """`bifrost kernels bench` of one kernel, without the trainer."""

    def command(context: Context, folder: Path) -> list[str]:
        sizes = words if context.full else (*words[:2], "--width", "256", "--tokens", "256", "--rep", "5")
        options = ["--mode", "full", "--json", str(folder / "bench.json")]
        return [sys.executable, "-m", "bifrost.kernels.bench", *sizes, *options]

    return command


def bench(*words: str, reduced: tuple[str, ...]) -> Command:
    """`bifrost bench`; elsewhere with `reduced` in addition."""

    def command(context: Context, folder: Path) -> list[str]:
        return bifrost("bench", *words, *(() if context.full else reduced), f"--out={folder}")

    return command


def work(name: str, shards: bool = False) -> Command:
    """A function of device_work.py. shards: whether it reads any."""

    def command(context: Context, folder: Path) -> list[str] | str:
        if shards and not glob.glob(context.shards):
            return f"no shards in {context.wheels.name}/shards: run make device-wheels"
        return [sys.executable, str(WORK), name, str(folder), "full" if context.full else "reduced", context.shards]

    return command


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def installed(folder: Path) -> dict[str, Any]:
    return {"packages": len(list((folder.parent / "site").glob("*.dist-info")))}


def tested(folder: Path) -> dict[str, Any]:
    """Numbers of tests; ValueError if one failed or none ran."""
    suite = next(ElementTree.parse(folder / "tests.xml").getroot().iter("testsuite"))
    found = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if not found["tests"]:
        raise ValueError("no test ran")
    return found


def timed(folder: Path) -> dict[str, Any]:
    """The fastest of our kernels at every size, and what it is compared with."""
    record = read(folder, "bench.json")
    best: dict[str, Any] = {}
    for row in record["rows"]:
        size = f"D={row['shape']['width']} T={row['tokens']}"
        if not row["baseline"] and row["timing"]["median"] < best.get(size, row)["timing"]["median"] * 1.0001:
            best[size] = row
    figures: dict[str, Any] = {}
    for size, row in best.items():
        over = f", {row['over_compile']:.2f}x compile" if row["over_compile"] else ""
        eager = f", {row['over_eager']:.2f}x eager" if row["over_eager"] else ""
        figures[size] = f"{row['provider']} {row['percent_of_floor']:.1f} % of the roofline{over}{eager}"
    return figures or {"timed": "eager alone, no other kernel runs here"}


def stepped(folder: Path) -> dict[str, Any]:
    (case, *_) = read(folder, "step.json")["cases"]
    return {
        "samples/s": round(case["routed_samples_s"], 2),
        "ratio": round(case["ratio"], 2),
        "MFU": case["mfu"],
        "activations, MiB": round(case["routed_activation_bytes"] / 2**20),
    }


def engine(folder: Path) -> dict[str, Any]:
    """Measured / planned, where both exist."""
    record = read(folder, "engine.json")
    measured, planned = record["measured"], record["planned"]
    names = {
        "step, s": ("step_s", 1),
        "MFU": ("mfu", 1),
        "held, GB": ("held_bytes", 1e-9),
        "peak, GB": ("peak_bytes", 1e-9),
    }
    figures = {}
    for name, (key, factor) in names.items():
        pair = [None if each[key] is None else f"{each[key] * factor:.4g}" for each in (measured, planned)]
        figures[name] = " / ".join(each or "-" for each in pair)
    return {**figures, "launches": measured["launches"], "allocator retries": measured["alloc_retries"]}


def worked(folder: Path) -> dict[str, Any]:
    return read(folder, "figures.json")


INSTALL = Part("install", 60, "the package and its wheels install without a network", install, installed)
PARTS = (
    INSTALL,
    Part("machine", 45, "versions, and the ceilings of this card", work("machine"), worked),
    Part("kernels", 90, "compiled kernels are right", tests(GPU_TESTS, PLAIN_TESTS, 4), tested),
    Part(
        "loss",
        90,
        "head and loss against its roofline, compile and eager",
        kernels("--kernel", "latent-loss", "--model", "3b,7b", "--tokens", "4k,16k", "--rep", "40", "--limit", "60"),
        timed,
    ),
    Part(
        "attention",
        40,
        "attention of the generation branch",
        kernels("--kernel", "attention", "--model", "3b,7b", "--tokens", "4k", "--rep", "40"),
        timed,
    ),
    Part(
        "norm",
        30,
        "gather and norm, next to Liger's",
        kernels("--kernel", "gather-norm", "--model", "3b,7b", "--tokens", "4k", "--rep", "40"),
        timed,
    ),
    Part(
        "step",
        50,
        "a stage-1 step without DeepSpeed, against fused dense attention",
        bench(
            *("step", "mllm-3b", "--baseline", "sdpa", "--text-tokens", "80", "--rounds", "5"),
            reduced=("--layers", "1", "--width", "256", "--samples", "1"),
        ),
        stepped,
    ),
    Part(
        "engine-mllm",
        150,
        "stage 1 at its own size under ZeRO-3: time, MFU, memory, each measured / planned",
        bench(
            *("engine", "mllm-3b", "--random", "--steps", "6", "--against-plan", "--ranks", "1"),
            reduced=("--layers", "1", "--width", "256", "micro_batch=2", SMALL_BUCKET),
        ),
        engine,
    ),
    Part("resume", 100, "a killed run resumes to the bit; a save", work("resume", shards=True), worked),
    Part(
        "engine-flux",
        100,
        "stage 2 at its own size under ZeRO-3: time, MFU, memory, each measured / planned",
        bench(
            *("engine", "flux-controlnet", "--random", "--steps", "4", "--against-plan", "--ranks", "1"),
            reduced=(
                *("--layers", "1", "--width", "256", "micro_batch=1", "flux.image_size=128", "data.image_size=112"),
                *("flux.placement.text=cached", SMALL_BUCKET),
            ),
        ),
        engine,
    ),
    Part("decode", 45, "16 decoding steps of stage 1 at its own size", work("decode"), worked),
    Part("generate", 60, "images through both stages", work("generate", shards=True), worked),
    Part("host-syncs", 45, "no host wait in a pass; Liger's layers", tests(HOST_TESTS, HOST_TESTS[1:], 2), tested),
)
"""In the order in which they run: what the rest depends on first, then by what would be missed most."""
