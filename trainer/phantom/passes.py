"""Counts of one forward and backward pass: FLOPs, what it keeps, its peak, where the host waits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...recipes import Recipe
from ..stages.unsharded import init_context
from .memory import on_device
from .mode import Phantom
from .recipe import DEVICE, dtype_of, open_placed, random_batch


@dataclass(frozen=True)
class PassCounts:
    """Of one micro-batch on one device that holds all weights.

    flops: of both passes. kept: bytes that the forward pass leaves for the backward pass. peak: bytes in addition to
    weights and inputs, the gradients of weights dropped as soon as they are complete. reads, copies: places in the code
    where the host waits, with counts, see `Phantom`. wrong: buffers on another device, or of another type than fp32.
    """

    flops: float
    kept: int
    peak: int
    reads: dict[str, int]
    copies: dict[str, int]
    wrong: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def count_pass(recipe: Recipe, text_tokens: int) -> PassCounts:
    """Count a pass of the recipe's micro-batch. text_tokens: of every prompt of stage 1."""
    with Phantom() as mode:
        stage = open_placed(recipe, placed=False)
        with init_context(DEVICE, dtype_of(recipe.precision)):
            model: Any = stage.build(recipe.activation_checkpointing)
        model.build_rest()
        model.train()
        drop_gradients(model)
        batch = random_batch(stage, recipe.micro_batch, text_tokens)
        if "images" in batch:
            model.patch_latents(batch["images"])  # its tables are made once per run
        before = mode.memory.live
        mode.restart()
        losses = model(**batch)
        kept = mode.memory.live - before
        losses.loss.backward()
        peak = mode.memory.peak - before
    return PassCounts(mode.flops.total, kept, peak, dict(mode.reads), dict(mode.copies), wrong_buffers(model))


def drop_gradients(model: nn.Module) -> None:
    """Free every gradient of a weight as soon as it is complete, as ZeRO-3 does after reducing it."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


def wrong_buffers(model: nn.Module) -> list[str]:
    """Buffers that are not on the device, or floating-point ones that are not fp32: rotary tables and statistics. Those
    of frozen parts outside the module tree are included."""
    return [
        f"{name}: {buffer.dtype} on {buffer.device}"
        for name, buffer in _buffers(model)
        if not on_device(buffer) or (buffer.is_floating_point() and buffer.dtype != torch.float32)
    ]


def _buffers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules(prefix=prefix):
        for each, buffer in module.named_buffers(name, recurse=False):
            yield each, buffer
        for each, unregistered in vars(module).items():
            if isinstance(unregistered, nn.Module):
                yield from _buffers(unregistered, f"{name}.{each}".lstrip("."))
