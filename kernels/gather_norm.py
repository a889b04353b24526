"""RMSNorm of selected rows with a compact result, as one operation.

Legend: T rows, of which R are selected, D width, x a selected row, s = rsqrt(mean_d x^2 + eps), n = x s,
g the gradient of the result.

The norm reads and writes its rows anyway, so selecting them is free; other rows are neither read nor normalized. This
is the branch's final norm when the loss covers only masked patches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .runtime import accumulator, check_device, tl, triton, triton_accumulator

Provider = Literal["reference", "triton"]


def gather_rms_norm(
    hidden: Tensor, rows: Tensor, weight: Tensor, eps: float, provider: Provider = "reference"
) -> Tensor:
    """weight * n for the rows `rows` of `hidden`, in their order: Qwen's RMSNorm, with its casts.

    hidden [T, D]; rows int64 [R], each at most once and in [0, T); weight [D]. Returns [R, D]. The variance is
    computed in fp32 (fp64 for fp64 inputs) and n is rounded to the dtype of `hidden` before the weight multiplies it.

    provider: `reference` is plain PyTorch; `triton` the fused kernel, interpreted without a GPU. `rows` is checked only
    on the CPU: on a GPU the check would synchronize with the host.
    """
    if provider == "triton":
        return _fused(hidden, rows, weight, eps)
    selected = hidden.index_select(0, rows).to(accumulator(hidden))
    normalized = selected * torch.rsqrt(selected.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normalized.to(hidden.dtype)


@triton.jit
def _forward_kernel(
    hidden, rows, weight, output, eps, D, stride_hidden, ACCUMULATE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One row of the result."""
    r = tl.program_id(0).to(tl.int64)  # T * D and R * D may exceed 2^31
    d = tl.arange(0, BLOCK_D)
    real = d < D
    row = tl.load(rows + r).to(tl.int64)
    x = tl.load(hidden + row * stride_hidden + d, mask=real, other=0.0).to(ACCUMULATE)
    n = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    w = tl.load(weight + d, mask=real, other=0.0).to(ACCUMULATE)
    value = w * n.to(hidden.dtype.element_ty).to(ACCUMULATE)
    tl.store(output + r * D + d, value.to(output.dtype.element_ty), mask=real)


@triton.jit
def _backward_kernel(
    gradient, hidden, rows, weight, d_hidden, partials, eps, R, D, stride_gradient, stride_hidden,
    NEED_HIDDEN: tl.constexpr, NEED_WEIGHT: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows in turn: dx = s (w g - n mean_d(w g n)) to their rows of d_hidden [T, D], sum_r g n to partials.

    s is recomputed, since the row is read anyway. No atomics: bitwise deterministic.
    """
    tile = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    real = d < D
    w = tl.load(weight + d, mask=real, other=0.0).to(ACCUMULATE)
    total = tl.zeros((BLOCK_D,), dtype=ACCUMULATE)
    for i in range(tile * BLOCK_R, min(tile * BLOCK_R + BLOCK_R, R)):
        r = tl.cast(i, tl.int64)
        row = tl.load(rows + r).to(tl.int64)
        x = tl.load(hidden + row * stride_hidden + d, mask=real, other=0.0).to(ACCUMULATE)
        g = tl.load(gradient + r * stride_gradient + d, mask=real, other=0.0).to(ACCUMULATE)
        s = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        n = x * s
        if NEED_HIDDEN:
            dn = w * g
            dx = s * (dn - n * (tl.sum(dn * n, axis=0) / D))
            tl.store(d_hidden + row * D + d, dx.to(d_hidden.dtype.element_ty), mask=real)
        if NEED_WEIGHT:
            total += g * n.to(hidden.dtype.element_ty).to(ACCUMULATE)
    if NEED_WEIGHT:
        tl.store(partials + tile.to(tl.int64) * D + d, total, mask=real)


BLOCK_R = 16
"""Rows per program of the backward pass: its partial sums of dWeight take 4 bytes per element and BLOCK_R rows."""


def _warps(block_d: int) -> int:
    return min(max(block_d // 512, 1), 16)


@torch.library.custom_op(
    "bifrost::gather_rms_norm",
    mutates_args=(),
    schema="(Tensor hidden, Tensor rows, Tensor weight, float eps) -> Tensor",
)
def _fused(hidden, rows, weight, eps):
    check_device(hidden.device)
    assert not rows.is_floating_point() and rows.dtype != torch.bool, f"rows is {rows.dtype}"
    width = hidden.shape[1]
    assert weight.shape == (width,), f"weight is {tuple(weight.shape)}, hidden {tuple(hidden.shape)}"
    if rows.device.type == "cpu" and len(rows):
        low, high = rows.aminmax()
        assert low >= 0 and high < len(hidden), f"rows range from {low} to {high}, hidden has {len(hidden)}"
        assert len(rows.unique()) == len(rows), "a row is selected twice"
    output = hidden.new_empty((len(rows), width), dtype=torch.promote_types(hidden.dtype, weight.dtype))
    if output.numel():
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        block_d = int(triton.next_power_of_2(width))
        _forward_kernel[(len(rows),)](
            hidden, rows.contiguous(), weight.contiguous(), output, eps, width, hidden.stride(0),
            ACCUMULATE=triton_accumulator(hidden), BLOCK_D=block_d,
            num_warps=_warps(block_d),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return output


@_fused.register_fake
def _(hidden, rows, weight, eps):
    shape = rows.shape[0], hidden.shape[1]
    return hidden.new_empty(shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))


@torch.library.custom_op(
    "bifrost::gather_rms_norm_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor hidden, Tensor rows, Tensor weight, float eps, bool need_hidden,"
    " bool need_weight) -> (Tensor, Tensor)",
)
def _fused_backward(gradient, hidden, rows, weight, eps, need_hidden, need_weight):
    """dHidden [T, D], zero except in the selected rows, and dWeight [D] in fp32. Empty if not needed."""
    accumulate = accumulator(hidden)
    selected, width = len(rows), hidden.shape[1]
    tiles = triton.cdiv(selected, BLOCK_R)
    d_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    partials = hidden.new_empty((tiles, width) if need_weight else (0, 0), dtype=accumulate)
    if selected and width and (need_hidden or need_weight):
        gradient, hidden = (x if x.stride(1) == 1 else x.contiguous() for x in (gradient, hidden))
        block_d = int(triton.next_power_of_2(width))
        _backward_kernel[(tiles,)](
            gradient, hidden, rows.contiguous(), weight.contiguous(), d_hidden, partials,
            eps, selected, width, gradient.stride(0), hidden.stride(0),
            NEED_HIDDEN=need_hidden, NEED_WEIGHT=need_weight,
            ACCUMULATE=triton_accumulator(hidden),
            BLOCK_R=BLOCK_R, BLOCK_D=block_d,
            num_warps=_warps(block_d),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return d_hidden, partials.sum(dim=0)


@_fused_backward.register_fake
def _(gradient, hidden, rows, weight, eps, need_hidden, need_weight):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        hidden.new_empty(hidden.shape[1] if need_weight else 0, dtype=accumulator(hidden)),
    )


def _save(ctx, inputs, output) -> None:
    hidden, rows, weight, ctx.eps = inputs
    # The parameter itself, never a copy: ZeRO-3 frees it between forward and backward, and gathers it again.
    ctx.save_for_backward(hidden, rows, weight)


def _backward(ctx, gradient):
    hidden, rows, weight = ctx.saved_tensors
    need_hidden, _, need_weight, _ = ctx.needs_input_grad
    d_hidden, d_weight = _fused_backward(gradient, hidden, rows, weight, ctx.eps, need_hidden, need_weight)
    return d_hidden if need_hidden else None, None, d_weight.to(weight.dtype) if need_weight else None, None


_fused.register_autograd(_backward, setup_context=_save)
