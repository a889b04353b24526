"""The routed step as in training and, for comparison, with layers compiled by torch, or without anything shared by the
masks of a sample; and a clock for all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import PrefixLayout
from ..planner.part import Part
from ..planner.timing import done_flops
from ..stages.patch_latent_model import PatchLatentModel
from .prompts import Batch

Mark = Callable[[str], None]


class Clock:
    """Seconds between marks, measured on the device without host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self("")

    def __call__(self, name: str) -> None:
        """Mark the end of `name`, the work since the previous mark."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        if self.cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            found[name] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        return found


def routed_step(model: PatchLatentModel, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
    """Prefix, branch, head and all gradients; returns the loss."""
    draws = len(batch.mask) // len(batch.lengths)
    latents = batch.latents if draws == 1 else batch.latents.repeat_interleave(draws, 0)
    layout = PrefixLayout.of(batch.lengths, batch.mask.shape[1], batch.mask.device, draws)
    prefix = model.backbone.prefix(batch.input_ids[batch.real], layout)
    mark("prefix")
    hidden = model.branch(latents, batch.mask, prefix)
    mark("branch forward")
    # The head separately, so that its backward pass is timed separately; the numbers are the same.
    leaf = hidden.detach().flatten(0, 1).requires_grad_()
    loss, _ = model.head(leaf, latents.flatten(0, 1), None, float(batch.mask.numel()))
    loss.backward()
    mark("head")
    assert leaf.grad is not None
    hidden.backward(leaf.grad.view_as(hidden))
    mark("branch backward")
    return loss.detach()


class CompiledStep:
    """The same with every branch layer through torch.compile, which ZeRO-3 rules out: its hooks gather weights inside a
    layer."""

    def __init__(self, model: PatchLatentModel, recomputed: bool) -> None:
        self.model, self.recomputed, self.eager = model, recomputed, model.branch.layers
        # One graph per layer: all layers share a class, for which torch's default limit is eight.
        torch._dynamo.config.recompile_limit = max(8, 2 * len(self.eager))
        self.layers = nn.ModuleList([_Compiled(layer) for layer in self.eager])

    def step(self, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
        self.model.branch.layers = self.layers
        try:
            loss = routed_step(self.model, batch)
        finally:
            self.model.branch.layers = self.eager
        mark("step")
        return loss

    def flops(self, samples: Sequence[Sequence[Part]], text: int) -> float:
        """FLOPs per sample, equal to those of the uncompiled step."""
        return sum(done_flops(list(parts), self.recomputed) for parts in samples) / len(samples)


class SingleStep:
    """The routed step with a vision encoder pass and a prefix for every mask: one mask per sample, and no cache."""

    def __init__(self, model: PatchLatentModel, recomputed: bool, draws: int) -> None:
        self.model, self.recomputed, self.draws = model, recomputed, draws

    def step(self, batch: Batch, mark: Mark = lambda name: None) -> Tensor:
        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(self.draws, 0)

        self.model.patch_latents(repeated(batch.images))
        lengths = tuple(length for length in batch.lengths for _ in range(self.draws))
        prompts = {"input_ids": repeated(batch.input_ids), "real": repeated(batch.real), "lengths": lengths}
        loss = routed_step(self.model, replace(batch, latents=repeated(batch.latents), **prompts))
        mark("step")
        return loss

    def flops(self, samples: Sequence[Sequence[Part]], text: int) -> float:
        """FLOPs per sample, whose parts are those with all masks."""
        frozen = sum(part.forward for sample in samples for part in sample if part.gradient == "none")
        trained = sum(done_flops([p for p in parts if p.gradient != "none"], self.recomputed) for parts in samples)
        return (self.draws * frozen + trained) / len(samples)


class _Compiled(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.compiled = torch.compile(layer)

    def forward(self, *inputs: Any) -> Tensor:
        return self.compiled(*inputs)
