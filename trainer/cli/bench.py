"""`bifrost bench`: the step, the data and the scaling of a recipe, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...recipes import load_recipe
from ..distributed.launcher import adopt_rank
from ..distributed.stop_signals import ignore_signals
from .options import Overrides, RecipeArgument

app = typer.Typer(no_args_is_help=True)


@app.command("step")
def bench_step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers; default all on a GPU, 4 on a CPU.", min=1)] = None,
    width: Annotated[
        int | None, typer.Option(help="Hidden width, all else in proportion; default the model's own, 768 on a CPU.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples a step; default micro_batch on a GPU, 4 on a CPU.", min=1)
    ] = None,
    text_tokens: Annotated[
        str, typer.Option(help="Prompt lengths, a row each; `real`: of many lengths, mean 80, the baseline pads them.")
    ] = "80,300,real",
    baseline: Annotated[
        str, typer.Option(help="eager: dense, as published; sdpa: dense, fused attention; compiled: ours, by torch.")
    ] = "eager",
    rounds: Annotated[int, typer.Option(help="Measured steps of each, in turns; the median counts.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for step.json.")] = None,
) -> None:
    """Time a stage-1 step with random weights: routed by modality, against the public release's dense formulation."""
    from ..bench.step import bench

    bench(
        load_recipe(recipe, overrides or []),
        layers=layers,
        width=width,
        samples=samples,
        text_tokens=text_tokens,
        baseline=baseline,
        rounds=rounds,
        out=out,
    )


@app.command("data")
def bench_data(
    source: Annotated[str | None, typer.Argument(help="A recipe, shards or their folder; none: made images.")] = None,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Samples a round, from the first shards.", min=1)] = 1024,
    workers: Annotated[int | None, typer.Option(help="Processes of every baseline; default one a core.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of all baselines; medians count.", min=1)] = 5,
    sides: Annotated[str, typer.Option(help="Least and most pixels of generated pictures' shorter side.")] = "512,1024",
    out: Annotated[Path | None, typer.Option(help="Folder for data.json.")] = None,
) -> None:
    """Time the reader against the machine's decode limit and a plain webdataset pipeline, and say where time goes."""
    from ..bench.data import bench

    bench(source, overrides or [], samples=samples, workers=workers, rounds=rounds, sides=sides, out=out)


@app.command("scale")
def bench_scale(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        str, typer.Option(help="Numbers of local ranks; under srun or torchrun theirs counts.")
    ] = "1,2,4,8",
    mode: Annotated[
        str | None, typer.Option(help="weak: micro_batch stays; strong: global_batch; default both.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps a point, after two others.", min=1)] = 8,
    out: Annotated[Path, typer.Option(help="Folder for a JSON a point, and scale.png of all.")] = Path("scale"),
    simulate: Annotated[
        int | None, typer.Option(help="Go through a run on so many ranks, starting none.", min=1)
    ] = None,
) -> None:
    """Time a few steps on 1, 2, 4, 8 ranks: scaling, communication, stragglers. Or go through a run on 512 of them."""
    settings = load_recipe(recipe, overrides or [])
    if simulate:
        from ..bench.simulate import report

        report(settings, simulate, out)
        return
    from ..bench import scale

    modes = scale.read_modes(mode)
    if not adopt_rank():
        options = [f"--steps={steps}", f"--out={out}"]
        code = scale.run_points(settings, modes, scale.read_ranks(ranks), out, [recipe, *(overrides or []), *options])
    else:
        code = scale.measure(settings, modes[0], steps, out)
        ignore_signals()
    raise typer.Exit(code)
