"""`bifrost bench step`: a stage-1 step, routed by modality, against a baseline: the dense formulation of the public
release, the routed step with compiled layers, or the routed step without a cache and without shared masks.

Both steps use the same weights and batch. Loss and all gradients of the branch are compared before timing; then the
steps alternate, and medians are reported. The vision encoder is timed separately, and excluded from the ratios where
both need it; there is no optimizer and only one rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...recipes import Recipe
from ...recipes.branch import Branch
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..models.backbone import read_config
from ..models.backbone_config import grid_side
from ..models.hub import architecture
from ..models.kernel_selection import KernelWork, VisionWork, choose_kernels
from ..planner.devices import this_device
from ..planner.flops import patch_latent_parts
from ..planner.opened import PatchLatents
from ..planner.part import Part
from ..planner.timing import done_flops, useful_flops
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from .comparison import activation_bytes, errors, gradients
from .dense import DenseStep
from .machine import machine, write_record
from .prompts import Batch, Case, cases, draw_batch, real_lengths
from .routed import Clock, CompiledStep, SingleStep, routed_step
from .shapes import random_model, scaled
from .step_table import Row, table

CPU_LAYERS, CPU_WIDTH, CPU_SAMPLES = 4, 768, 4
TEXT_TOKENS = "80,300,real"
BASELINES = ("eager", "sdpa", "compiled", "single")
Baseline = DenseStep | CompiledStep | SingleStep


def bench(
    recipe: Recipe,
    *,
    layers: int | None,
    width: int | None,
    samples: int | None,
    text_tokens: str | None = None,
    baseline: str | None = None,
    rounds: int,
    out: Path | None,
) -> list[Row]:
    """Measure every case of `text_tokens`, print the table and write `out`/step.json; see `bifrost bench step`."""
    text_tokens, baseline = text_tokens or TEXT_TOKENS, baseline or BASELINES[0]
    _require_comparable(baseline, recipe.branch)
    own = read_config(architecture(recipe.backbone.path, recipe.backbone.revision))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        layers = layers or min(CPU_LAYERS, own.text_config.num_hidden_layers)
        width = width or min(CPU_WIDTH, own.text_config.hidden_size)
        samples = samples or CPU_SAMPLES
    samples = samples or recipe.micro_batch
    dtype = torch.bfloat16 if device.type == "cuda" and recipe.precision == "bf16" else torch.float32
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    draws = recipe.branch.draws if baseline == "single" else 1
    branch = recipe.branch.model_copy(update={"loss_tokens": "all", "draws": draws})  # what the release computes
    found = cases(text_tokens, samples, branch.max_text_tokens)
    config = scaled(own, layers, width)
    size, recomputed = recipe.data.image_size, recipe.activation_checkpointing
    tokens = grid_side(config, size) ** 2
    work = KernelWork.of(config, samples, tokens, branch.max_text_tokens, precision)
    lengths = [length for length in real_lengths(samples, branch.max_text_tokens) for _ in range(draws)]
    vision = VisionWork.of(config, samples, (size, size), precision)
    kernels, _ = choose_kernels(recipe.kernels, replace(work, lengths=lengths), vision, Ranks(0, 1, device))
    settings = recipe.backbone, branch, size, recipe.seed, config, tokens
    stage = PatchLatentStage(*settings, None, None, kernels, for_counting=True)
    model = random_model(partial(stage.build, recomputed), device, dtype)
    counted = PatchLatents(config, recipe.backbone, branch, size, recipe.seed)
    opponent = _baseline(baseline, model, recomputed, draws)
    text = config.text_config
    record: dict[str, Any] = {
        "recipe": recipe.name,
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "mlp": text.intermediate_size,
        "heads": [text.num_attention_heads, text.num_key_value_heads],
        "patches": tokens,
        "samples": samples,
        "draws": draws,
        "vision_encoder": "cached" if recipe.backbone.vision_encoder else "computed",
        "rounds": rounds,
        "precision": precision,
        "activation_checkpointing": recomputed,
        "baseline": baseline,
        "kernels": asdict(kernels),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine("transformers"),
    }
    rows: list[Row] = []
    for case in found:
        batch = draw_batch(case, tokens, size, config, device, dtype, draws)
        flops = [patch_latent_parts(counted, precision, float(length)) for length in case.lengths]
        if baseline != "single":
            flops = [step_parts(parts) for parts in flops]
        for against in (opponent, None):  # without the baseline, if only that does not fit
            try:
                rows.append(measure(model, batch, case, against, rounds, recomputed, flops))
                break
            except torch.OutOfMemoryError:
                model.zero_grad(set_to_none=True)
                which = "the routed step" if against is None else f"the baseline ({baseline})"
                print(f"{case.name} text tokens: {which} does not fit in the memory of this device", flush=True)
        record["cases"] = [asdict(row) for row in rows]
        if out:
            write_record(out, "step.json", record)
    if not rows:
        raise RunError("bench step: no case fits in the memory of this device; give fewer --samples")
    print(table(record, rows))
    return rows


def _require_comparable(baseline: str, branch: Branch) -> None:
    """RunError for an unknown baseline, or a branch that none computes."""
    if baseline not in BASELINES:
        raise RunError(f"--baseline {baseline}: give one of {', '.join(BASELINES)}")
    if branch.head != "linear":
        raise RunError("bench step: compares with the public release, whose head is linear; set branch.head=linear")
    if branch.targets != "native":
        raise RunError("bench step: the public release predicts the MLLM's own latents; set branch.targets=native")
    if branch.layers is not None or branch.weights != "full":
        raise RunError("bench step measures a full copy of every layer: leave branch.layers and branch.weights out")


def _baseline(name: str, model: PatchLatentModel, recomputed: bool, draws: int) -> Baseline:
    if name == "compiled":
        return CompiledStep(model, recomputed)
    return SingleStep(model, recomputed, draws) if name == "single" else DenseStep(model, name)  # type: ignore[arg-type]


def measure(
    model: PatchLatentModel,
    batch: Batch,
    case: Case,
    baseline: Baseline | None,
    rounds: int,
    recomputed: bool,
    flops: list[list[Part]],
) -> Row:
    """Compare the results, count the activations, then time in alternation. RunError if the results differ.

    Without a baseline, measure the routed step only.
    """
    loss_error = gradient_error = baseline_kept = None
    inputs, device = vars(batch).values(), batch.latents.device
    if baseline:
        loss_error, gradient_error = compare(model, batch, baseline)
        baseline_kept = activation_bytes(lambda: baseline.step(batch), model, inputs, device)
    kept = activation_bytes(lambda: routed_step(model, batch), model, inputs, device)
    routed_times, baseline_times = time_rounds(model, batch, baseline, rounds)
    parts = {name: statistics.median(times[name] for times in routed_times) for name in routed_times[0]}
    # The dense baselines have the same vision encoder.
    own_encoder = any(part.name == "vision encoder" and part.place != "cached" for part in flops[0])
    steps = [sum(times.values()) - (0 if own_encoder else times["tower"]) for times in routed_times]
    routed_s, baseline_s = statistics.median(steps), statistics.median(baseline_times) if baseline else None
    samples = len(case.lengths)
    useful = sum(useful_flops(sample) for sample in flops) / samples
    routed_flops = sum(done_flops(sample, recomputed) for sample in flops) / samples
    baseline_flops = baseline.flops(flops, case.padded) if baseline else None
    peak = this_device()
    limit = peak.bf16_tflops * 1e12 if peak and peak.bf16_tflops and batch.latents.dtype == torch.bfloat16 else None

    def share(count: float | None, seconds: float | None) -> float | None:
        return count * samples / seconds / limit if limit and count and seconds else None

    return Row(
        text_tokens=case.name,
        mean_text_tokens=sum(case.lengths) / samples,
        padded_text_tokens=case.padded,
        routed_s=routed_s,
        baseline_s=baseline_s,
        # Per round: other load on the machine then slows both alike.
        ratio=statistics.median(t / own for t, own in zip(baseline_times, steps, strict=True)) if baseline else None,
        routed_samples_s=samples / routed_s,
        baseline_samples_s=samples / baseline_s if baseline_s else None,
        routed_activation_bytes=kept,
        baseline_activation_bytes=baseline_kept,
        activation_ratio=baseline_kept / kept if baseline_kept else None,
        useful_flops=useful,
        routed_flops=routed_flops,
        baseline_flops=baseline_flops,
        flops_ratio=baseline_flops / routed_flops if baseline_flops else None,
        loss_error=loss_error,
        gradient_error=gradient_error,
        shares={name: spent / sum(parts.values()) for name, spent in parts.items()},
        mfu=share(useful, routed_s),
        hfu=share(routed_flops, routed_s),
        baseline_mfu=share(useful, baseline_s),
        baseline_hfu=share(baseline_flops, baseline_s),
    )


def compare(model: PatchLatentModel, batch: Batch, baseline: Baseline) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient; RunError if one is above TOLERANCE."""
    trained = model.trainable()
    wanted = gradients(lambda: baseline.step(batch), trained)
    return errors(gradients(lambda: routed_step(model, batch), trained), wanted, batch.latents.dtype)


def time_rounds(
    model: PatchLatentModel, batch: Batch, baseline: Baseline | None, rounds: int
) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds per round: of each part of the routed step, and of the baseline's step, in alternation."""
    device = batch.latents.device
    routed_times: list[dict[str, float]] = []
    baseline_times: list[float] = []
    for _ in range(rounds):
        clock = Clock(device)
        model.patch_latents(batch.images)
        clock("tower")
        routed_step(model, batch, clock)
        routed_times.append(clock.seconds())
        model.zero_grad(set_to_none=True)
        if baseline:
            clock = Clock(device)
            baseline.step(batch, clock)
            baseline_times.append(clock.seconds()["step"])
            model.zero_grad(set_to_none=True)
    return routed_times, baseline_times


def step_parts(parts: Iterable[Part]) -> list[Part]:
    """The parts of the step: all but the vision encoder."""
    return [part for part in parts if part.name != "vision encoder"]
