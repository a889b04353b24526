"""`bifrost kernels`: compile, check, profile and time the Triton kernels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...recipes import load_recipe
from ..distributed.launcher import run_child
from ..training.batch import split_batch
from ..versions import require
from .on_ranks import leave, on_ranks
from .options import Overrides, RanksOption, RecipeArgument

app = typer.Typer(no_args_is_help=True)


@app.command("check")
def kernels_check() -> None:
    """Compile every kernel for sm_80, sm_90 and sm_100, without a GPU; exit code 1 when one spills, does not fit or
    has more instructions than recorded."""
    require("triton")
    # A process of its own: on a machine without a GPU this one has Triton's interpreter.
    leave(run_child("bifrost.kernels.compile_check", counts="kernels"))


@app.command("profile")
def kernels_profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Profiled steps, after two warm-up steps.", min=1)] = 3,
    ranks: RanksOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the trace and the table.")] = Path("profile"),
) -> None:
    """Train a few steps of a recipe under torch.profiler: time by kind of work, and a trace for Perfetto."""
    settings = load_recipe(recipe, overrides or [])
    arguments = ["kernels", "profile", recipe, *(overrides or []), f"--steps={steps}", f"--out={out}"]

    def profiled() -> int:
        from ..bench.profile import profile_steps
        from ..bench.short_run import ShortRun

        return profile_steps(ShortRun.of(settings, steps, out / ".run", log_every=settings.steps), out)

    split = partial(split_batch, settings.global_batch, settings.micro_batch, hpz=settings.zero.hpz)
    on_ranks(ranks, arguments, profiled, split)


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def kernels_bench(context: typer.Context) -> None:
    """Time the kernels against PyTorch and a roofline measured in the same run; --help lists the options."""
    require("triton")
    # A process of its own: without a GPU this one has Triton's interpreter, and it has much else in memory.
    leave(run_child("bifrost.kernels.bench", *context.args))
