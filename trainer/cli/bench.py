"""`bifrost bench`: the step, the data and the scaling of a recipe, measured on this machine."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ...recipes import load_recipe
from ..distributed.launcher import devices, init_from_env
from ..distributed.stop_signals import ignore_signals
from ..errors import RunError
from .on_ranks import on_ranks
from .options import Overrides, RanksOption, RecipeArgument, counts

app = typer.Typer(no_args_is_help=True)


class ScalingMode(str, Enum):
    weak = "weak"
    strong = "strong"


@app.command("step")
def bench_step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    layers: Annotated[
        int | None,
        typer.Option(help="Decoder layers, or FLUX's double blocks; default all on a GPU, 4 on a CPU.", min=1),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Hidden width, the rest scaled; default the model's own on a GPU, on a CPU 768, or 512 for FLUX."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples per step; default micro_batch on a GPU, 4 on a CPU.", min=1)
    ] = None,
    text_tokens: Annotated[
        str | None,
        typer.Option(
            help="Stage 1: prompt lengths, one row each; `real`: mixed lengths, mean 80, padded in the baseline;"
            " default 80,300,real. Stage 2: one number; default T5's length, on a CPU at most 256."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Stage 1: eager (default): dense, as published; sdpa: dense, fused attention; compiled: ours, by"
            " torch; single: ours, with a vision encoder pass and a prefix per mask. Stage 2: diffusers (default): its"
            " FLUX ControlNet example, encoders cached; online: with VAE and vision encoder in every step."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured steps of each, alternating; medians are reported.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for step.json.")] = None,
) -> None:
    """Time a training step with random weights: stage 1 against the public release's dense formulation, stage 2 against
    diffusers' FLUX ControlNet example."""
    settings = load_recipe(recipe, overrides or [])
    if settings.stage == "controlnet":
        from ..bench.controlnet_step import bench
    else:
        from ..bench.step import bench

    bench(
        settings,
        layers=layers,
        width=width,
        samples=samples,
        text_tokens=text_tokens,
        baseline=baseline,
        rounds=rounds,
        out=out,
    )


@app.command("engine")
def bench_engine(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    random: Annotated[
        bool,
        typer.Option("--random", help="Draw the weights on the device; only configs are read."),
    ] = False,
    steps: Annotated[int, typer.Option(help="Measured steps, after two warm-up steps.", min=1)] = 6,
    against_plan: Annotated[
        bool, typer.Option("--against-plan", help="Print what `bifrost plan` predicts for as many GPUs as well.")
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            help="With --random: decoder layers, or FLUX's double blocks; default all on a GPU, on a CPU at most 4.",
            min=1,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="With --random: hidden width, the rest scaled; default all on a GPU, on a CPU at most 768."),
    ] = None,
    ranks: RanksOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for engine.json.")] = None,
) -> None:
    """Time steps of a recipe's model under DeepSpeed's ZeRO-3 on synthetic batches, and compare them with the plan."""
    if (layers or width) and not random:
        raise RunError("--layers and --width: the model's files have their own; add --random")
    settings = load_recipe(recipe, overrides or [])

    def work() -> int:
        from ..bench.engine import Size, bench

        size = Size(layers, width)
        return bench(settings, random=random, size=size, steps=steps, against_plan=against_plan, out=out)

    flags = [name for name, given in (("--random", random), ("--against-plan", against_plan)) if given]
    given = {"--layers": layers, "--width": width, "--out": out}
    options = [f"--steps={steps}", *flags, *(f"{name}={value}" for name, value in given.items() if value)]
    on_ranks(ranks, ["bench", "engine", recipe, *(overrides or []), *options], work, lambda number: None)


@app.command("data")
def bench_data(
    source: Annotated[
        str | None, typer.Argument(help="A recipe, shards or their folder; default generated images.")
    ] = None,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Samples per round, from the first shards.", min=1)] = 1024,
    workers: Annotated[
        int | None, typer.Option(help="Processes of every baseline; default one per core.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds over all baselines; medians are reported.", min=1)] = 5,
    sides: Annotated[str, typer.Option(help="Range of generated images' shorter side, pixels.")] = "512,1024",
    latency: Annotated[
        str | None,
        typer.Option(help="Read over HTTP, from a server on loopback with this latency, such as 30ms; default files."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for data.json.")] = None,
) -> None:
    """Time the reader against the machine's decode limit and the readers of other libraries, by part."""
    from ..bench.data import bench

    bench(
        source, overrides or [], samples=samples, workers=workers, rounds=rounds, sides=sides, latency=latency, out=out
    )


@app.command("checkpoint")
def bench_checkpoint(
    size: Annotated[str, typer.Option(help="Bytes of the state of all ranks: masters and moments.")] = "768MiB",
    ranks: Annotated[
        int | None, typer.Option(help="Processes on this machine; default one per GPU, at least 2.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds over all formats; medians are reported.", min=1)] = 5,
    folder: Annotated[Path, typer.Option(help="Folder on the storage to measure; cleaned up.")] = Path("."),
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoint.json.")] = None,
) -> None:
    """Time save and load of a sharded state: our checkpoints, DeepSpeed's, and torch DCP's."""

    def work() -> int:
        from ..bench.checkpoint import bench

        return bench(size, rounds, folder, out)

    arguments = [f"--size={size}", f"--rounds={rounds}", f"--folder={folder}", *([f"--out={out}"] if out else [])]
    on_ranks(ranks, ["bench", "checkpoint", *arguments], work, lambda number: None, usual=lambda: max(2, devices()))


@app.command("scale")
def bench_scale(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        str, typer.Option(help="Numbers of local ranks; srun's or torchrun's takes precedence.")
    ] = "1,2,4,8",
    mode: Annotated[
        ScalingMode | None, typer.Option(help="Fixed micro_batch (weak) or global_batch (strong); default both.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps per point, after two warm-up steps.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for one JSON per point, and scale.png.")] = Path("scale"),
    simulate: Annotated[
        int | None, typer.Option(help="Simulate a run on this many ranks, without starting any.", min=1)
    ] = None,
) -> None:
    """Time a few steps on 1, 2, 4, 8 ranks: scaling, communication, stragglers. Or simulate thousands of ranks."""
    settings = load_recipe(recipe, overrides or [])
    if simulate:
        from ..bench.simulate import report

        report(settings, simulate, out)
        return
    from ..bench import scale
    from ..bench.short_run import ShortRun

    modes: list[scale.Mode] = [each for each in scale.MODES if mode in (None, each)]
    if not init_from_env():
        options = [f"--steps={steps}", f"--out={out}"]
        numbers = sorted(set(counts("--ranks", ranks)))
        arguments = [recipe, *(overrides or []), *options]
        code = scale.run_points(settings.global_batch, settings.micro_batch, modes, numbers, out, arguments)
    else:
        ranks_now = int(os.environ["WORLD_SIZE"])
        sizes = scale.split(modes[0], settings.global_batch, settings.micro_batch, ranks_now)
        batch = {"global_batch": sizes.global_batch, "micro_batch": sizes.micro_batch}
        run = ShortRun.of(settings, steps, scale.folder(modes[0], ranks_now, out), log_every=1, **batch)
        code = scale.measure(run, modes[0], sizes, out)
        ignore_signals()
    raise typer.Exit(code)
