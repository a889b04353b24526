"""`bifrost train`, `resume`, `export` and `data encode`: a run, its cached inputs and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...data.progress import progress
from ...data.units import counted
from ...recipes import BatchSplit, load_recipe
from ...slurm.named_paths import require_paths
from ..distributed.launcher import devices, has_gpu_files, init_from_env, run_ranks
from ..errors import RunError
from ..training.batch import split_batch
from ..training.run_folder import check_run, placed, ranks_of
from ..training.setting_changes import check_fixed, finished_line
from ..versions import importing
from .on_ranks import leave, on_ranks
from .options import Overrides, RanksOption, RecipeArgument

if TYPE_CHECKING:  # it imports pydantic models, which `--help` does not need
    from ...recipes import Recipe


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: RanksOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
) -> None:
    """Train a recipe, or continue from its newest checkpoint."""
    settings = load_recipe(recipe, overrides or [])

    run, values = Path(settings.runs_dir) / settings.name, settings.model_dump(mode="json")
    if not dry_run:
        split, done = partial(_split, run, values), partial(finished_line, run, values)
        on_ranks(ranks, ["train", recipe, *(overrides or [])], lambda: _train()(settings), split, run, done)
    from ..models.hub import architecture
    from ..optim.deepspeed_config import deepspeed_config
    from ..planner import parts

    batch = split_batch(settings.global_batch, settings.micro_batch, ranks or devices(), settings.zero.hpz)
    planned = parts(settings)
    require_paths(run, settings.previews, settings.init_from)
    if settings.previews.every and settings.previews.flux:
        architecture(settings.previews.flux, None, "previews.flux")
    trainable = sum(part.size for part in planned if part.gradient == "trained")
    frozen = sum(part.size for part in planned) - trainable
    print(settings.to_yaml())
    print("# DeepSpeed")
    zero, clip = settings.zero, settings.optimizer.clip
    print(json.dumps(deepspeed_config(batch, settings.precision, zero, clip, not has_gpu_files()), indent=2))
    print(f"trainable parameters  {trainable:>16,}")
    print(f"frozen parameters     {frozen:>16,}")
    samples = counted(settings.steps * batch.global_batch, "sample")
    print(
        f"global batch {batch.global_batch} = {counted(batch.ranks, 'rank')} x micro batch {batch.micro_batch}"
        f" x {counted(batch.passes, 'backward pass', 'es')}; {counted(settings.steps, 'step')} = {samples}"
    )


def resume(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/mllm-7b.")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Processes; default the run's last number.", min=1)] = None,
) -> None:
    """Continue a run from its newest checkpoint, with its stored settings, or with some of them changed."""
    check_run(run)
    given = overrides or []
    settings = load_recipe(run / "recipe.yaml", [*given, *placed(run, given)], stored=True)
    arguments = ["resume", str(run), *given]

    values = settings.model_dump(mode="json")
    split, done = partial(_split, run, values), partial(finished_line, run, values)
    on_ranks(ranks, arguments, lambda: _train()(settings), split, run, done, usual=lambda: ranks_of(run) or devices())


def _train() -> Callable[[Recipe], int]:
    """`training.train.train`, imported only by the ranks."""
    with importing():
        from ..training.train import train
    return train


def _split(run: Path, settings: dict[str, Any], ranks: int) -> BatchSplit:
    """The batch on `ranks` ranks; RunError when it does not divide, or the run cannot continue with these settings."""
    check_fixed(run, settings)
    return split_batch(settings["global_batch"], settings["micro_batch"], ranks, settings["zero"]["hpz"])


def encode(recipe: RecipeArgument, overrides: Overrides = None, ranks: RanksOption = None) -> None:
    """Cache the outputs of the frozen parts (those placed as `cached`), and predicted latents, with the indexes."""
    settings = load_recipe(recipe, overrides or [])
    if settings.stage == "patch-latents":
        cached, how = settings.backbone.vision_encoder == "cached", "backbone.vision_encoder=cached"
    else:
        placed = settings.flux is not None and settings.flux.placement.cached
        cached = placed or settings.controlnet.latents != "true"
        how = "flux.placement.vae, text or vision_encoder to cached, or controlnet.latents"
    if not cached:
        raise RunError(f"{settings.name}: caches nothing; set {how}")
    adopted = init_from_env(ranks)
    ranks = ranks or devices()
    if adopted or ranks == 1:
        from ..inference.predicted_latents import PredictedOutputs
        from ..stages import open_controlnet, open_patch_latents
        from ..stages.precompute import encode as precompute

        if settings.stage == "patch-latents":
            stage = open_patch_latents(settings)
        else:
            stage = open_controlnet(settings, predictor=PredictedOutputs.open)
        leave(precompute(stage.outputs(), settings.data, settings.validation.shards, settings.micro_batch))
    leave(run_ranks(ranks, ["data", "encode", recipe, *(overrides or [])]))


class Layout(str, Enum):
    public = "public"
    hf = "hf"
    pipeline = "pipeline"


class Precision(str, Enum):
    bf16 = "bf16"
    fp32 = "fp32"


def export(
    run: Annotated[Path, typer.Argument(help="A run folder; for a pipeline that of stage 1, or a checkpoint in it.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[
        Layout,
        typer.Option(
            "--format",
            help="public: the release's layout with the base; hf: the trained part; pipeline: both stages.",
        ),
    ] = Layout.public,
    controlnet: Annotated[
        Path | None, typer.Option(help="For a pipeline: a stage-2 run folder, or a checkpoint in it.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help="Precision of the weights; default bf16, of a pipeline fp32.", show_default=False),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights; a pipeline has them anyway.")] = False,
    step: Annotated[int | None, typer.Option(help="Step; default the newest.")] = None,
) -> None:
    """Write a run's trained weights as safetensors, or those of both stages as a pipeline."""
    if layout is Layout.pipeline:
        _export_pipeline(run, controlnet, out, precision, ema, step)
        return
    if controlnet is not None:
        raise RunError("--controlnet is for --format pipeline: leave it out, or export that run by itself")
    import torch

    from ..checkpoint.export import export as write

    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    with progress("exporting"):
        taken = write(run, out, layout.value, dtype, ema, step)
    print(f"{out}: step {taken} of {run} in the {layout.value} layout")


def _export_pipeline(
    run: Path, controlnet: Path | None, out: Path, precision: Precision | None, ema: bool, step: int | None
) -> None:
    if controlnet is None:
        raise RunError("--format pipeline: give the stage-2 run too, with --controlnet RUN")
    if step is not None:
        raise RunError(f"--step: give the checkpoint's folder in place of the run, such as {run}/checkpoints/step-…")
    if ema:
        raise RunError("--ema: leave it out; a pipeline has averaged weights if the run has, like bifrost generate")
    import torch

    from ..inference.export_pipeline import export_pipeline

    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    with progress("exporting"):
        steps = export_pipeline(run, controlnet, out, dtype)
    print(f"{out}: step {steps[0]} of {run} and step {steps[1]} of {controlnet} as a pipeline")
