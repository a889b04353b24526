"""FLUX's operations between its matrix products, each of which saves for the backward pass only what a product or the
attention saves anyway: norms, modulation, rotation and GELU are computed again there, a matrix product never.

Legend: B samples, S tokens, H hidden width, h heads of width C, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F

from ...kernels import dense_attention, dense_is_faster
from .eight_bits import dequantized
from .linear import linear

EPS = 1e-6


class _ModulatedNorm(torch.autograd.Function):
    """(1 + scale) LayerNorm(hidden) + shift. Saves hidden, and mean and deviation per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed, mean, deviation = torch.native_layer_norm(hidden, hidden.shape[-1:], None, None, EPS)
        ctx.save_for_backward(hidden, mean, deviation, scale)
        return torch.addcmul(shift.unsqueeze(1), normed, (1 + scale).unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, mean, deviation, scale = ctx.saved_tensors
        for_hidden, for_scale, for_shift = ctx.needs_input_grad
        d_hidden = d_scale = None
        shape = hidden.shape[-1:]
        if for_hidden:
            d_normed = gradient * (1 + scale).unsqueeze(1)
            d_hidden = torch.ops.aten.native_layer_norm_backward(
                d_normed, hidden, shape, mean, deviation, None, None, [True, False, False]
            )[0]
        if for_scale:
            d_scale = torch.native_layer_norm(hidden, shape, None, None, EPS)[0].mul_(gradient).sum(1)
        return d_hidden, d_scale, gradient.sum(1) if for_shift else None


def modulated_norm(hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) LayerNorm(hidden) + shift for hidden [B, S, H] and scale, shift [B, H]."""
    return _ModulatedNorm.apply(hidden, scale, shift)  # type: ignore[return-value]


def _rotate_normed(x: Tensor, weight: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The result of `rotated_norm`, and the reciprocal root mean square [B, S, h, 1]."""
    exact = x.to(weight.dtype, copy=True)
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(EPS).rsqrt_()
    exact.mul_(scale).mul_(weight)
    torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(rotation.unsqueeze(1))
    return exact.to(x.dtype), scale


class _RotatedNorm(torch.autograd.Function):
    """See `rotated_norm`. Saves x, and the reciprocal root mean square per head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, exact_weight: Tensor, rotation: Tensor) -> Tensor:
        out, scale = _rotate_normed(x, exact_weight, rotation)
        ctx.save_for_backward(x, scale, exact_weight, rotation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """dx = s (g w - n mean(g w n)), with g the gradient rotated back, n the normalised x and s its scale."""
        x, scale, weight, rotation = ctx.saved_tensors
        back = gradient.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
        torch.view_as_complex(back.unflatten(-1, (-1, 2))).mul_(rotation.conj_physical().unsqueeze(1))
        normed = x.to(weight.dtype) * scale
        product = back * normed
        d_weight = product.flatten(0, -2).sum(0).to(x.dtype) if ctx.needs_input_grad[1] else None
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        d_x = back.mul_(weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight, None, None


class HeadRows(NamedTuple):
    """Queries or keys of one stream: normalised and rotated, and what they are computed from.

    rotated, raw [B, S, h, C]; weight [C] of the norm, a copy in the type of the computation; rotation [S, C / 2].
    """

    rotated: Tensor
    raw: Tensor
    weight: Tensor
    rotation: Tensor


def rotated_norm(x: Tensor, weight: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm over the heads x [B, S, h, C] with `weight` [C], then rotation of neighbouring pairs by `rotation`
    [S, C / 2], complex. Computed in fp32 (fp64 for fp64 inputs), rounded once. Also returns a copy of the weight in the
    type of the computation."""
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return _RotatedNorm.apply(x, weight, exact, rotation), exact  # type: ignore[return-value]


class _Enter(torch.autograd.Function):
    """Query, key and value as results of a node that holds none of them, in contrast to leaf tensors."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(gradients))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of query, key and value [B, S, h, C]: [B, S, h, C]."""
    if dense_is_faster(key.shape[1], key.device, key.dtype):
        return dense_attention(query, key, value, key.shape[-1] ** -0.5)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """torch's attention, whose saved query and key are replaced by what they were computed from.

    What it saves in addition, the scores' logarithms or on a CPU the probabilities, is kept.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Sequence[HeadRows]]) -> Tensor:
        saved: list[Any] = []

        def pack(tensor: Tensor) -> int:
            saved.append(tensor)
            return len(saved) - 1

        inputs = query, key, value
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda index: _restored(ctx, saved[index])):
            entered: Any = _Enter.apply(torch.empty(0, requires_grad=True), *inputs)
            out = _attend(*entered)
        ctx.edges = get_gradient_edge(out), [get_gradient_edge(x) for x in entered]
        out = out.detach()
        kept = {_storage(x): name for name, x in zip(("query", "key", "value", "out"), (*inputs, out), strict=True)}
        for index, tensor in enumerate(saved):
            if name := kept.get(_storage(tensor)):
                saved[index] = _View(name, tensor.shape, tensor.stride(), tensor.storage_offset())
        ctx.counts = [len(rows) for rows in parts]
        ctx.saved, ctx.others = saved, [index for index, tensor in enumerate(saved) if isinstance(tensor, Tensor)]
        of_rows = [x for rows in parts for row in rows for x in row[1:]]
        ctx.save_for_backward(value, out, *(saved[index] for index in ctx.others), *of_rows)
        for index in ctx.others:
            saved[index] = None  # a saved tensor of this node, which hooks see
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, out, *rest = ctx.saved_tensors
        for index in ctx.others:
            ctx.saved[index] = rest.pop(0)
        rows = iter([tuple(rest[i : i + 3]) for i in range(0, len(rest), 3)])
        query, key = (_joined([_rotate_normed(*next(rows))[0] for _ in range(count)]) for count in ctx.counts)
        ctx.tensors = {"query": query, "key": key, "value": value, "out": out}
        result, inputs = ctx.edges
        gradients = torch.autograd.grad(result, inputs, gradient)
        del ctx.tensors, ctx.edges, ctx.saved
        return *gradients, None


class _View(NamedTuple):
    """A tensor that attention saves, as a view of a tensor that is saved already or computed again."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _restored(ctx: Any, saved: Any) -> Tensor:
    if isinstance(saved, _View):
        return ctx.tensors[saved.name].as_strided(saved.shape, saved.stride, saved.offset)
    return saved


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def attention(query: Sequence[HeadRows], key: Sequence[HeadRows], value: Tensor, save_all: bool) -> Tensor:
    """Attention of all queries to all keys and value [B, S, h, C], each in the order of its streams: [B, S, h, C].

    save_all: leave it to autograd what is saved, as activation checkpointing needs.
    """
    q, k = (_joined([row.rotated for row in rows]) for rows in (query, key))
    if save_all or not torch.is_grad_enabled():
        return _attend(q, k, value)
    parts = [[row._replace(raw=row.raw.detach()) for row in rows] for rows in (query, key)]
    return _Attention.apply(q, k, value, parts)  # type: ignore[return-value]


class _GeluLinear(torch.autograd.Function):
    """[attended, GELU(mlp)] weight^T + bias. Saves mlp, and attended if the weight is trained."""

    @staticmethod
    def forward(
        ctx: Any, mlp: Tensor, attended: Tensor | None, weight: Tensor, bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        ctx.weight, ctx.scale = weight, scale  # attributes: see `linear`
        ctx.save_for_backward(mlp, attended if weight.requires_grad else None)
        return F.linear(_activated(mlp, attended), dequantized(weight, scale, mlp.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mlp, attended = ctx.saved_tensors
        _, for_attended, for_weight, for_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        d_weight = rows.T @ _activated(mlp, attended).flatten(0, -2) if for_weight else None
        d_bias = rows.sum(0) if for_bias else None
        d_input = (rows @ dequantized(ctx.weight, ctx.scale, rows.dtype)).unflatten(0, gradient.shape[:-1])
        d_attended, d_mlp = d_input.split((d_input.shape[-1] - mlp.shape[-1], mlp.shape[-1]), dim=-1)
        d_mlp = torch.ops.aten.gelu_backward(d_mlp, mlp, approximate="tanh")
        return d_mlp, d_attended if for_attended else None, d_weight, d_bias, None


def _activated(mlp: Tensor, attended: Tensor | None) -> Tensor:
    """[attended, GELU(mlp)] [B, S, H + F], or the GELU alone."""
    if attended is None:
        return F.gelu(mlp, approximate="tanh")
    out = mlp.new_empty(*mlp.shape[:-1], attended.shape[-1] + mlp.shape[-1])
    first, second = out.split((attended.shape[-1], mlp.shape[-1]), dim=-1)
    first.copy_(attended)
    torch.ops.aten.gelu.out(mlp, approximate="tanh", out=second)
    return out


def gelu_linear(
    mlp: Tensor,
    attended: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    recomputed: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """[attended, GELU(mlp)] weight^T + bias for mlp [B, S, F] and attended [B, S, H] or None.

    recomputed: under activation checkpointing, whose recomputation skips a frozen product only behind torch's GELU.
    scale: that of a weight in 8 bits.
    """
    if not torch.is_grad_enabled():
        return F.linear(_activated(mlp, attended), dequantized(weight, scale, mlp.dtype), bias)
    if recomputed and not weight.requires_grad:
        activated = F.gelu(mlp, approximate="tanh")
        return linear(activated if attended is None else torch.cat((attended, activated), -1), weight, bias, scale)
    return _GeluLinear.apply(mlp, attended, weight, bias, scale)  # type: ignore[return-value]


class _GatedSum(torch.autograd.Function):
    """hidden + gate change, the gate frozen. An attribute, not a saved tensor: activation checkpointing recomputes a
    block up to its last saved tensor, and would compute `change`, a product, again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor, change: Tensor) -> Tensor:
        ctx.gate = gate
        return torch.addcmul(hidden, gate, change)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        return gradient, None, gradient * ctx.gate


def gated_sum(hidden: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """hidden + gate change for hidden and change [B, S, H] and gate [B, 1, H]."""
    if gate.requires_grad or not torch.is_grad_enabled():
        return torch.addcmul(hidden, gate, change)
    return _GatedSum.apply(hidden, gate, change)  # type: ignore[return-value]


class _AddResidual(torch.autograd.Function):
    """In place: hidden += residual on the last rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor) -> Tensor:
        ctx.mark_dirty(hidden)
        ctx.rows = residual.shape[1]
        hidden[:, -ctx.rows :].add_(residual)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient[:, -ctx.rows :]


def add_residual(hidden: Tensor, residual: Tensor) -> Tensor:
    """hidden [B, S, H] with residual [B, M, H] added to its last M tokens; overwrites hidden, which must be no input of
    a module."""
    return _AddResidual.apply(hidden, residual)  # type: ignore[return-value]
