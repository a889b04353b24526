"""Two formulations of a step compared: loss, gradients, and the bytes that each keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RunError

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative difference of loss and gradients between a step and its baseline."""


class Gradients(NamedTuple):
    """Loss of a step, and its gradients by parameter name."""

    loss: float
    of: dict[str, Tensor]


def gradients(step: Callable[[], Tensor], trained: Mapping[str, nn.Parameter]) -> Gradients:
    """Run `step`, which returns its loss after its backward pass; leaves no gradients behind."""
    loss = float(step())
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    for parameter in trained.values():
        parameter.grad = None
    return Gradients(loss, found)


def errors(ours: Gradients, wanted: Gradients, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient; RunError if one is above `TOLERANCE`."""
    loss_error = abs(ours.loss - wanted.loss) / abs(wanted.loss)
    if ours.of.keys() != wanted.of.keys():
        raise RunError(f"bench step: gradients of {sorted(ours.of.keys() ^ wanted.of.keys())} exist on one side only")
    found = {n: float((ours.of[n] - wanted.of[n]).norm() / wanted.of[n].norm().clamp_min(1e-30)) for n in wanted.of}
    worst = max(found, key=lambda name: found[name])
    limit = TOLERANCE[dtype]
    if not max(loss_error, found[worst]) <= limit:
        raise RunError(
            f"bench step: the baseline differs: loss by {loss_error:.1e}, {worst} by {found[worst]:.1e};"
            f" at most {limit}"
        )
    return loss_error, found[worst]


def activation_bytes(
    step: Callable[[], object], model: nn.Module, batch: Iterable[object], device: torch.device
) -> int:
    """Peak bytes of activations in a step of `model`: on a GPU the allocator's peak beyond weights, batch and
    gradients; on a CPU the storages that autograd saves for the backward pass, each counted once."""
    if device.type == "cuda":
        step()  # allocates the gradients
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        model.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated() - before
    own = [*model.parameters(), *model.buffers(), *batch]
    known = {x.untyped_storage().data_ptr() for x in own if isinstance(x, Tensor)}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            found[place] = tensor  # kept alive until the count, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    model.zero_grad(set_to_none=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())
