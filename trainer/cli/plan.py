"""`bifrost plan`: what a recipe needs and costs on N GPUs, predicted."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.errors import DataError
from ...recipes import load_recipe
from ...slurm.named_paths import require_paths
from ..errors import RunError, writing
from .options import Overrides, RecipeArgument, counts

if TYPE_CHECKING:
    from ...recipes.schema import Data
    from ..planner.opened import LatentControl, PatchLatents

log = logging.getLogger(__name__)


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, such as 8,64,256.")] = "8,64,256,512",
    device: Annotated[str | None, typer.Option(help="h200, h100, a100, …, or a file; default this machine's.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples to cost; default the recipe's whole run.", min=1)] = None,
    text_tokens: Annotated[float, typer.Option(help="Mean tokens of a stage-1 prompt, template included.")] = 80,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, bytes and seconds.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw throughput from 8 to 512 GPUs into this PNG.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Count a step on a phantom GPU instead, and compare it with the plan.")
    ] = False,
) -> None:
    """Predict memory, FLOPs, traffic, step time and cost of a recipe on any number of GPUs."""
    settings = load_recipe(recipe, overrides or [])
    require_paths(Path(settings.runs_dir) / settings.name, settings.previews, settings.init_from)
    numbers, prompted = counts("--gpus", gpus), settings.stage == "patch-latents"
    text_tokens = min(text_tokens, settings.branch.max_text_tokens)
    if check:
        raise typer.Exit(0 if _check(recipe, overrides or [], numbers, round(text_tokens), as_json) else 1)
    from ..planner.devices import find_device, this_device

    chosen = find_device(device) if device else this_device()
    if plot and (chosen is None or chosen.bf16_tflops is None):
        raise RunError("--plot: needs step times; give a --device that has bf16_tflops")
    from ..planner import caches, open_model, parts, workload
    from ..planner.base_loss import planned_texts
    from ..planner.buckets import planned_buckets
    from ..planner.curves import draw
    from ..planner.opened import PatchLatents
    from ..planner.previews import image_generator_bytes
    from ..planner.report import Prompts, Report
    from ..planner.sources import samples_of_sources
    from ..terminal import terminal

    work = workload(settings)
    previews = image_generator_bytes(settings.previews) if prompted else 0.0  # stage 2 generates images itself
    model, data = open_model(settings), settings.data
    shares = _bucket_shares(model, data, settings.global_batch)
    prompts = None
    if isinstance(model, PatchLatents):
        prompts = Prompts(text_tokens, settings.branch.max_text_tokens, model.edited)
    report = Report(
        settings.name,
        parts(settings, text_tokens, shares=shares),
        work,
        numbers,
        chosen,
        prompts,
        previews,
        caches(settings),
    )
    samples = samples or settings.steps * settings.global_batch
    sources = samples_of_sources(data, settings.global_batch, samples)
    buckets = planned_buckets(model, data, settings.precision, text_tokens, shares)
    texts = []
    if isinstance(model, PatchLatents):
        texts = planned_texts(model, data, report.parts, work, text_tokens, chosen)
    if as_json:
        print(json.dumps(report.as_json(samples, sources, buckets, texts), indent=2))
    else:
        report.show(terminal(), samples, sources, buckets, texts)
    if plot and chosen:
        with writing(plot):
            draw(settings.name, report.parts, work, chosen, plot)


def _bucket_shares(model: PatchLatents | LatentControl, data: Data, global_batch: int) -> Sequence[float] | None:
    """The buckets' shares of the samples, from the indexes of the shards; None without buckets, and without shards that
    can be read, which is logged."""
    if data.buckets is None:
        return None
    from ..planner.buckets import rule_of
    from ..training.bucket_shares import bucket_shares

    try:
        return bucket_shares(data, rule_of(model, data), global_batch)
    except (DataError, RunError) as error:
        log.warning("shares of the buckets are not known, and taken as equal: %s", error)
        return None


def _check(recipe: str, overrides: list[str], gpus: list[int], text_tokens: int, as_json: bool) -> bool:
    """Print counted figures next to planned ones; whether they agree."""
    from ..models.image_grids import only_largest
    from ..phantom.check import check
    from ..planner import open_model, parts_of, workload
    from ..planner.opened import PatchLatents
    from ..terminal import terminal

    settings = load_recipe(recipe, overrides)
    model = open_model(settings)
    if isinstance(model, PatchLatents) and model.edited:
        model = replace(model, edited=1.0)  # the batch that is counted has pairs alone
    shares = only_largest(model.grids)
    counted = parts_of(model, settings.precision, text_tokens, text_tokens, shares)
    found = check((recipe, overrides), counted, workload(settings), gpus, text_tokens)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        found.show(terminal(), settings.name)
    return found.agrees
