"""RMSNorm and SwiGLU that save for the backward pass only what the matrix products save anyway.

The backward pass recomputes a norm from its input, and SiLU(gate) * up, a layer's largest activation, from gate and up.
This costs a few element-wise passes and no matrix product; a layer keeps about half as much.

Computed by torch or by Liger's fused kernels. Liger's own patch of transformers replaces classes by name for every
model of the process and enables a fused cross-entropy; here its functions replace those of one model's layers only.
Rotary embedding stays torch's: the published recipe does not rotate patches.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import importlib
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

Provider = Literal["torch", "liger"]


class _Norm(torch.autograd.Function):
    """weight * n with n = x s rounded to the dtype of x, s = rsqrt(mean x^2 + eps) in fp32 (fp64 for fp64 inputs), with
    Qwen's casts. Saves x and s."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (exact * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """dx = s (g - n mean(g n)) with g the gradient of n; dweight = output gradient times n, summed over rows."""
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden * scale
        product = gradient * normed
        d_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight.to(product.dtype)).unsqueeze(-1) / weight.numel()
        d_hidden = (gradient * weight.to(scale.dtype)).sub_(normed.mul_(mean)).mul_(scale)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None


class RmsNorm(nn.Module):
    """Qwen's RMSNorm over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return _Norm.apply(hidden, self.weight, self.eps)  # type: ignore[return-value]


class SwiGlu:
    """SiLU(gate) * up in torch."""

    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        """The product, differentiable by autograd."""
        return F.silu(gate) * up

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up. May overwrite all three arguments."""
        d_up = F.silu(gate).mul_(gradient)
        return torch.ops.aten.silu_backward(gradient.mul_(up), gate), d_up


class _GatedDown(torch.autograd.Function):
    """(SiLU(gate) * up) weight^T. Saves gate and up, not their product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, product: type[SwiGlu]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.weight = weight  # an attribute: see `linear`
        ctx.product = product
        return F.linear(product.forward(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_weight = gradient.flatten(0, -2).T @ ctx.product.forward(gate, up).flatten(0, -2)
        return *ctx.product.backward(gradient @ ctx.weight, gate, up), d_weight, None


class GatedProjection(torch.autograd.Function):
    """p = SiLU(gate) * up and p a^T; without `a`, p and None. Saves gate and up."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, a: Tensor | None, product: type[SwiGlu]
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(gate, up)
        ctx.a = a  # an attribute: see `linear`
        ctx.product = product
        out = product.forward(gate, up)
        return out, None if a is None else F.linear(out, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_low: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        d_a = None
        if ctx.a is not None:
            assert of_low is not None
            d_a = of_low.flatten(0, -2).T @ ctx.product.forward(gate, up).flatten(0, -2)
            gradient = gradient + of_low @ ctx.a
        return *ctx.product.backward(gradient, gate, up), d_a, None


class Gated:
    """A layer of SiLU(gate) * up."""

    product: type[SwiGlu] = SwiGlu


class GatedDown(nn.Linear, Gated):
    """The MLP's down projection of SiLU(gate) * up."""

    def forward(self, gate: Tensor, up: Tensor, recomputed: bool) -> Tensor:  # type: ignore[override]
        """recomputed: under activation checkpointing, whose recomputation skips this map only if it is torch's."""
        if recomputed:
            return F.linear(self.product.apply(gate, up), self.weight)
        return _GatedDown.apply(gate, up, self.weight, self.product)  # type: ignore[return-value]


def unavailable(provider: Provider, device: torch.device) -> str | None:
    """Why `provider` cannot run on `device`, in one line; None if it can."""
    if provider == "torch":
        return None
    if device.type != "cuda":
        return "liger needs a CUDA device"
    try:
        _liger()
    except Exception as error:  # it fails in many ways with another version of Triton
        return f"liger cannot be imported ({type(error).__name__}: {error}): pip install liger-kernel"
    return None


def use_liger(model: nn.Module) -> None:
    """Compute every RMSNorm and SwiGLU in `model` with Liger; norms out of place, as other operations read their
    gradients."""
    norm, product = _liger()

    def normalized(self: Any, hidden: Tensor) -> Tensor:
        eps = self.eps if isinstance(self, RmsNorm) else self.variance_epsilon
        # Offset 0, Llama's casts (rounded before the product with the weight), not in place.
        return norm.apply(hidden, self.weight, eps, 0.0, "llama", False)

    def gated(self: Any, hidden: Tensor) -> Tensor:
        return self.down_proj(product.apply(self.gate_proj(hidden), self.up_proj(hidden)))

    for module in model.modules():
        if type(module) in (RmsNorm, qwen.Qwen2_5_VLRMSNorm):
            module.forward = MethodType(normalized, module)
        elif type(module) in (qwen.Qwen2MLP, qwen.Qwen2_5_VLMLP):
            module.forward = MethodType(gated, module)
        elif isinstance(module, Gated):
            module.product = product


def _liger() -> tuple[Any, type[SwiGlu]]:
    """Liger's autograd function of RMSNorm, and its SwiGLU."""
    operations = importlib.import_module("liger_kernel.ops")
    swiglu = importlib.import_module("liger_kernel.ops.swiglu")

    class Product(SwiGlu):
        apply = operations.LigerSiLUMulFunction.apply

        @staticmethod
        def forward(gate: Tensor, up: Tensor) -> Tensor:
            return swiglu.swiglu_forward(gate, up)[-1]

        @staticmethod
        def backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
            d_gate, d_up = swiglu.swiglu_backward(gate, up, gradient)
            return d_gate.view_as(gate), d_up.view_as(up)

    return operations.LigerRMSNormFunction, Product
