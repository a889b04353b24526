"""A linear layer that keeps only what its gradients need: its input if the weight is trained, nothing if it is frozen.

The weight of a frozen layer may be in 8 bits, see `eight_bits`: it is dequantized for the product in each pass.

torch's own keeps the gathered weight of a sharded layer until the backward pass, which undoes the sharding; DeepSpeed's
replacement for the whole process (`memory_efficient_linear`, switched off in our configuration) keeps the input of
frozen layers as well and adds the bias in a second pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .eight_bits import dequantized, scale_of


class _Linear(torch.autograd.Function):
    """input weight^T + bias."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        # The parameter itself, as an attribute: ZeRO-3 empties it after the forward pass and gathers it for the
        # backward pass, while a saved tensor could hold on to the gathered weight.
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(input if weight.requires_grad else None)
        return _by_rows(input, dequantized(weight, scale, input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (input,) = ctx.saved_tensors
        for_input, for_weight, for_bias, _ = ctx.needs_input_grad
        rows, d_input = gradient.flatten(0, -2), None
        if for_input:
            d_input = (rows @ dequantized(ctx.weight, ctx.scale, rows.dtype)).unflatten(0, gradient.shape[:-1])
        return (
            d_input,
            rows.T @ input.flatten(0, -2) if for_weight else None,
            rows.sum(0) if for_bias else None,
            None,
        )


def _by_rows(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One product with the bias in it: torch would multiply strided matrices one by one and add the bias afterwards."""
    return F.linear(input.flatten(0, -2), weight, bias).unflatten(0, input.shape[:-1])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """input weight^T + bias: [..., in] -> [..., out]. scale: that of a weight in 8 bits."""
    if not torch.is_grad_enabled():
        return _by_rows(input, dequantized(weight, scale, input.dtype), bias)
    return _Linear.apply(input, weight, bias, scale)  # type: ignore[return-value]


class Linear(nn.Linear):
    """torch's Linear with its parameters and results."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, scale_of(self))


def use_own_linear(model: nn.Module) -> None:
    """Turn every torch Linear in `model` into a `Linear`; parameters, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
