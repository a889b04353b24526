"""Arguments of the benchmark: kernels, sizes, modes, providers, files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import attention, latent_loss
from .attention import DENSE, HEAD_WIDTH, attention_problem
from .cases import (
    MODES,
    PATCHES,
    SHAPES,
    Builder,
    Mode,
    Shape,
    gather_norm_problem,
    mask_mix_problem,
)
from .loss import latent_loss_problem
from .report import read_csv

BUILDERS: dict[str, Builder] = {
    "latent-loss": latent_loss_problem,
    "attention": attention_problem,
    "mask-mix": mask_mix_problem,
    "gather-norm": gather_norm_problem,
}
PROVIDERS: dict[str, tuple[str, ...]] = {
    "latent-loss": ("eager", "compile", *latent_loss.PROVIDERS),
    "attention": (*DENSE, *attention.BACKENDS),
    "mask-mix": ("eager", "compile", "triton"),
    "gather-norm": ("eager", "compile", "triton", "liger"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    kernels: list[str]
    shapes: list[Shape]
    tokens: list[int]
    modes: list[Mode]
    providers: list[str]
    dtype: str
    rep: float
    """Milliseconds spent on each row."""
    csv: Path | None
    json: Path | None
    plots: Path | None
    fail_below: float | None
    """Percent of the floor."""
    limit: float | None
    """Seconds after which no further size begins."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser(on_gpu: bool) -> Parser:
    made = Parser(prog="bifrost kernels bench", description="Time the kernels against PyTorch and a measured floor.")
    made.add_argument("--kernel", default="all", help=f"{', '.join(BUILDERS)}, or all (default)")
    made.add_argument("--model", help="3b, 7b (D = 2048, 3584); default both, on a CPU --width 256")
    made.add_argument("--width", type=int, help=f"another width D; heads of {HEAD_WIDTH}")
    made.add_argument(
        "--tokens",
        default="4k,8k,16k,32k,64k,128k" if on_gpu else "256,1k",
        help="integers, k = 1024 (default %(default)s)",
    )
    made.add_argument("--mode", default=",".join(MODES), help="(default %(default)s)")
    made.add_argument("--provider", help="default all that can run; on a CPU all but compile")
    made.add_argument("--dtype", default="bf16", choices=DTYPES)
    made.add_argument(
        "--rep",
        type=float,
        default=100 if on_gpu else 20,
        metavar="MS",
        help="milliseconds spent on each row (default %(default)s)",
    )
    made.add_argument(
        "--limit", type=float, metavar="S", help="begin no further size after this many seconds; the smallest are first"
    )
    made.add_argument("--csv", type=Path, metavar="FILE", help="insert or update rows in Liger-Kernel's format")
    made.add_argument("--json", type=Path, metavar="FILE")
    made.add_argument("--plots", type=Path, metavar="DIR")
    made.add_argument(
        "--fail-below",
        type=float,
        metavar="PCT",
        help="exit code 1 when at any size the fastest of our providers is under PCT percent of the floor",
    )
    return made


def _several(made: Parser, option: str, text: str, known: Sequence[str]) -> list[Any]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            made.error(f"--{option} {name}: known are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _tokens(made: Parser, text: str) -> list[int]:
    found = []
    for word in text.split(","):
        digits = word.strip().removesuffix("k")
        if not digits.isdecimal() or not int(digits):
            made.error(f"--tokens {word}: must be integers, such as 8192 or 8k")
        found.append(int(digits) * (1024 if word.strip().endswith("k") else 1))
    return sorted(set(found))


def read_arguments(arguments: Sequence[str] | None, device: torch.device) -> Plan:
    """Parse the arguments; raises SystemExit 2 after a one-line error."""
    on_gpu = device.type == "cuda"
    made = parser(on_gpu)
    given = made.parse_args(arguments)
    kernels = list(BUILDERS) if given.kernel == "all" else _several(made, "kernel", given.kernel, tuple(BUILDERS))
    if given.model and given.width is not None:
        made.error("--model and --width exclude each other")
    if given.width is not None or not (given.model or on_gpu):
        width = 256 if given.width is None else given.width
        heads = width // HEAD_WIDTH
        if width < 8 or width % 8:
            made.error(f"--width {width}: must be a multiple of 8")
        if "attention" in kernels and (width % HEAD_WIDTH or heads % max(heads // 8, 1)):
            made.error(f"--width {width}: attention has heads of {HEAD_WIDTH} in groups of eight")
        shapes = [Shape("", width, heads, max(heads // 8, 1))]
    else:
        shapes = [SHAPES[model] for model in _several(made, "model", given.model or "3b,7b", tuple(SHAPES))]
    tokens = _tokens(made, given.tokens)
    if whole := {"attention", "mask-mix"}.intersection(kernels):
        for count in tokens:
            if count % PATCHES:
                made.error(f"--tokens {count}: {' and '.join(sorted(whole))} take whole images of {PATCHES} patches")
    modes = _several(made, "mode", given.mode, MODES)
    known = list(dict.fromkeys(name for kernel in kernels for name in PROVIDERS[kernel]))
    if given.provider:
        providers = _several(made, "provider", given.provider, known)
    else:
        providers = known if on_gpu else [name for name in known if name != "compile"]
    if given.rep <= 0:
        made.error(f"--rep {given.rep:g}: must be more than 0 ms")
    if given.limit is not None and given.limit <= 0:
        made.error(f"--limit {given.limit:g}: must be more than 0 s")
    if given.fail_below is not None and "full" not in modes:
        made.error("--fail-below compares mode full, which --mode leaves out")
    for option, path in (("csv", given.csv), ("json", given.json)):
        if path and path.is_dir():
            made.error(f"--{option} {path}: is a folder; name a file")
    if given.plots and given.plots.exists() and not given.plots.is_dir():
        made.error(f"--plots {given.plots}: is a file; name a folder")
    if given.csv:
        try:
            read_csv(given.csv)
        except ValueError as error:
            made.error(f"--csv: {error}")
    return Plan(
        kernels,
        shapes,
        tokens,
        modes,
        providers,
        given.dtype,
        given.rep,
        given.csv,
        given.json,
        given.plots,
        given.fail_below,
        given.limit,
    )
