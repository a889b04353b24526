"""`bifrost bench step` of a recipe of stage controlnet: a stage-2 step as it trains with all its caches, against the
same step by diffusers' own classes, with the same caches or encoding the images in every step.

Loss and all gradients of the ControlNet are compared before timing; then the steps alternate. There is no optimizer and
only one rank.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...recipes import Recipe
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..models.kernel_selection import VisionWork, choose_kernels
from ..models.latent_controlnet import LatentControlNet
from ..planner.flux_shapes import hidden_width
from ..stages import open_controlnet
from ..stages.controlnet import ControlNetStage
from ..stages.controlnet_model import LatentControlNetModel
from .comparison import Gradients, activation_bytes, errors, gradients
from .controlnet_shapes import Batch, control_shape, draw_batch, random_model, scaled_stage
from .controlnet_table import Result, table
from .diffusers_step import DiffusersStep
from .machine import machine, write_record
from .routed import Clock, Mark

CPU_LAYERS, CPU_WIDTH, CPU_SAMPLES, CPU_TEXT_TOKENS = 4, 512, 4, 256
BASELINES = ("diffusers", "online")
CANCELLED = ("sampling_block.upconv.bias", "sampling_block.downconv.bias", "sampling_block.conv.bias")
"""Ends of the names of the resampler's biases, each of which precedes a norm."""


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
) -> Result:
    """Measure, print the table and write `out`/step.json; see `bifrost bench step`."""
    baseline = baseline or BASELINES[0]
    if baseline not in BASELINES:
        raise RunError(
            f"--baseline {baseline}: {recipe.name} is of stage controlnet, give one of {', '.join(BASELINES)}"
        )
    assert recipe.flux is not None, "required by the recipe schema"
    if recipe.flux.weights != "bf16":
        raise RunError(
            f"flux.weights={recipe.flux.weights}: the baseline has no weights in 8 bits; set flux.weights=bf16"
        )
    opened = open_controlnet(recipe, for_counting=True)
    control_shape(opened)  # refuses other bridges
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = opened.folder.text_lengths[0]
    length = min(CPU_TEXT_TOKENS, longest) if device.type == "cpu" else longest
    if text_tokens is not None:
        length = _length(text_tokens, longest)
    if device.type == "cpu":
        layers = layers or min(CPU_LAYERS, opened.folder.blocks[0])
        width = width or min(CPU_WIDTH, hidden_width(opened.folder.transformer))
        samples = samples or CPU_SAMPLES
    samples = samples or recipe.micro_batch
    stage = scaled_stage(opened, layers, width)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    if baseline == "online":
        side = recipe.data.image_size
        work = VisionWork.of(stage.config, samples, (side, side), recipe.precision)
        kernels, _ = choose_kernels(recipe.kernels, None, work, Ranks(0, 1, device))
        stage = replace(stage, kernels=kernels)
    try:
        model = random_model(stage, baseline == "online", recipe.activation_checkpointing, device, dtype)
        batch = draw_batch(stage, model, samples, length, dtype)
        result = measure(model, DiffusersStep(model, dtype, baseline == "online"), batch, rounds)
    except torch.OutOfMemoryError as error:
        raise RunError("bench step: does not fit in the memory of this device; give fewer --samples") from error
    record = {
        **_settings(stage, recipe.name, batch),
        "rounds": rounds,
        "precision": recipe.precision,
        "activation_checkpointing": recipe.activation_checkpointing,
        "baseline": baseline,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine("diffusers"),
        **asdict(result),
    }
    if out:
        write_record(out, "step.json", record)
    print(table(record, result))
    return result


def _length(text: str, longest: int) -> int:
    """The number of text tokens per sample."""
    if not text.isdecimal() or not 1 <= int(text) <= longest:
        raise RunError(f"--text-tokens {text}: FLUX's text is padded; give one number from 1 to {longest}")
    return int(text)


def _settings(stage: ControlNetStage, name: str, batch: Batch) -> dict[str, Any]:
    """What was measured, for the record."""
    transformer, shape = stage.folder.transformer, control_shape(stage)
    return {
        "recipe": name,
        "layers": list(stage.folder.blocks),
        "controlnet": [shape.double, shape.single],
        "width": hidden_width(transformer),
        "heads": transformer["num_attention_heads"],
        "image_tokens": batch.noise.shape[1],
        "text_tokens": batch.text.shape[1],
        "text_width": batch.text.shape[2],
        "patches": batch.latents.shape[1],
        "latent_width": batch.latents.shape[2],
        "resampling": shape.resampling,
        "samples": len(batch.noise),
    }


def cached_step(model: LatentControlNetModel, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
    """Loss and all gradients as in training, with the outputs of the frozen encoders from their caches."""
    losses = model(
        posterior=batch.posterior,
        noise=batch.noise,
        level=batch.level,
        normalizer=float(batch.noise.numel()),
        mean=batch.mean,
        std=batch.std,
        text=batch.text,
        pooled=batch.pooled,
        latents=batch.latents,
    )
    mark("forward")
    losses.loss.backward()
    mark("backward")
    return losses.loss.detach()


def measure(model: LatentControlNetModel, baseline: DiffusersStep, batch: Batch, rounds: int) -> Result:
    """Compare the results, count the activations, then time in alternation. RunError if the results differ."""
    device, inputs = batch.noise.device, vars(batch).values()
    own, theirs = partial(cached_step, model, batch), partial(baseline.step, batch)
    with warnings.catch_warnings():
        # A CPU has no fused RMSNorm for bf16 inputs with fp32 weights, which the example's autocast leads to.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)
        loss_error, gradient_error = compare(model, baseline, own, theirs)
        kept = activation_bytes(own, model, inputs, device)
        baseline_kept = activation_bytes(theirs, baseline, inputs, device)
        times, baseline_times = [], []
        for _ in range(rounds):
            for module, step, found in ((model, own, times), (baseline, theirs, baseline_times)):
                clock = Clock(device)
                step(clock)
                found.append(clock.seconds())
                module.zero_grad(set_to_none=True)
    steps, baseline_steps = ([sum(each.values()) for each in found] for found in (times, baseline_times))
    ours_s, baseline_s, samples = statistics.median(steps), statistics.median(baseline_steps), len(batch.noise)
    return Result(
        ours_s=ours_s,
        baseline_s=baseline_s,
        # Per round: other load on the machine then slows both alike.
        ratio=statistics.median(t / own for t, own in zip(baseline_steps, steps, strict=True)),
        ours_samples_s=samples / ours_s,
        baseline_samples_s=samples / baseline_s,
        ours_activation_bytes=kept,
        baseline_activation_bytes=baseline_kept,
        baseline_copied_bytes=baseline.copied_bytes,
        activation_ratio=baseline_kept / kept,
        loss_error=loss_error,
        gradient_error=gradient_error,
        ours_parts_s=_medians(times),
        baseline_parts_s=_medians(baseline_times),
    )


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in times) for name in times[0]}


def compare(
    model: LatentControlNetModel, baseline: DiffusersStep, own: Callable[[], Tensor], theirs: Callable[[], Tensor]
) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient; RunError if one is above the tolerance."""
    assert isinstance(model.controlnet, LatentControlNet)
    dtype, shape = next(model.controlnet.parameters()).dtype, model.controlnet.shape

    def compared(found: Gradients) -> Gradients:
        """Without biases before a BatchNorm, which subtracts them again: their gradients are rounding."""
        batch_norm = shape.norm == "batch"
        return Gradients(found.loss, {n: g for n, g in found.of.items() if not (batch_norm and n.endswith(CANCELLED))})

    wanted = gradients(theirs, baseline.trainable())
    return errors(compared(gradients(own, model.trainable())), compared(wanted), dtype)
