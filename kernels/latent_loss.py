"""The projection of hidden states to patch latents and its squared error, as one operation.

Legend: T tokens (all patches of a micro-batch in one row), K width of the hidden states, D width of the latents
(equal to K in Bifrost-1), r = hidden W^T + b - target.

The residual is formed in the GEMM's epilogue from the fp32 accumulator and stored once, rounded to the compute type.
Eager PyTorch rounds the prediction before it subtracts, so that its residual carries the rounding of the prediction:
the nearer the prediction, the larger the relative error of the gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .runtime import INTERPRETED, check_device, tl, triton

Provider = Literal["reference", "triton"]


def patch_latent_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    normalizer: Tensor | float,
    provider: Provider = "reference",
) -> tuple[Tensor, Tensor]:
    """Weighted mean squared error of the projected hidden states, in fp32.

    loss = sum_t token_weight[t] * mean_d r[t, d]^2 / normalizer

    hidden [T, K]; weight [D, K]; bias [D] or None; target [T, D]; token_weight [T]; normalizer: the number of tokens
    that the mean goes over, which under data parallelism is not T. Returns the loss [] and the unweighted mean square
    of every token [T], detached. fp64 inputs are computed in fp64.

    provider: `reference` is plain PyTorch; `triton` the fused kernel, interpreted where there is no GPU.
    """
    if provider == "triton":
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        keep = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden, weight, bias, target)
        )  # the residual is kept for a backward pass alone
        total, squares, _ = _fused(hidden, weight, bias, target, token_weight, keep)
        return total / normalizer, squares.detach()
    accumulate = _accumulator(hidden)
    prediction = F.linear(hidden, weight, bias)
    squares = (prediction.to(accumulate) - target.to(accumulate)).square().mean(dim=-1)
    return (squares * token_weight.to(accumulate)).sum() / normalizer, squares.detach()


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@triton.jit
def _residual_kernel(
    hidden, weight, bias, target, token_weight, residual, partials,
    T, K, D, stride_hidden, stride_weight, stride_target,
    HAS_BIAS: tl.constexpr, STORE: tl.constexpr, ACCUMULATE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of r: its rows' sums of squares go to partials [D tiles, T], token_weight * r to residual [T, D].

    Every element of both is written once, by one program, in a fixed order: no atomics, the same bits every time.
    """
    # Programs that run together share rows of weight tiles: GROUP row tiles are walked column by column.
    pid = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D)
    first = pid // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    tile_t = first + pid % (GROUP * column_tiles) % height
    tile_d = pid % (GROUP * column_tiles) // height

    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = t.to(tl.int64)[:, None]  # T * D may pass 2^31
    real_t, real_d = t < T, d < D
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACCUMULATE)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(hidden + rows * stride_hidden + k[None, :], mask=real_t[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(
            weight + d[None, :] * stride_weight + k[:, None], mask=real_d[None, :] & (k < K)[:, None], other=0.0
        )
        if UPCAST:  # the interpreter multiplies bf16 wrongly
            h, w = h.to(ACCUMULATE), w.to(ACCUMULATE)
        total = tl.dot(h, w, total, input_precision="ieee", out_dtype=ACCUMULATE)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=real_d, other=0.0).to(ACCUMULATE)[None, :]
    inside = real_t[:, None] & real_d[None, :]
    total -= tl.load(target + rows * stride_target + d[None, :], mask=inside, other=0.0).to(ACCUMULATE)
    total = tl.where(inside, total, 0.0)
    tl.store(partials + tile_d.to(tl.int64) * T + t, tl.sum(total * total, axis=1), mask=real_t)
    if STORE:
        scale = tl.load(token_weight + t, mask=real_t, other=0.0).to(ACCUMULATE)
        tl.store(residual + rows * D + d[None, :], (total * scale[:, None]).to(residual.dtype.element_ty), mask=inside)


# Rows, columns, depth, row tiles a group, warps, stages. 128 x 128 x 64 with eight warps spills nothing on sm_90.
TILES = (128, 128, 64, 8, 8, 3)
_INTERPRETED_TILES = (64, 64, 64, 8, 4, 1)


@torch.library.custom_op(
    "bifrost::patch_latent_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor token_weight, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def _fused(hidden, weight, bias, target, token_weight, keep):
    """Weighted sum of mean squares [], mean squares [T], and token_weight * r [T, D] (empty unless `keep`)."""
    check_device(hidden.device)
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
    accumulate = _accumulator(hidden)
    hidden, weight, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight, target))
    (tokens, width), latents = hidden.shape, weight.shape[0]
    block_t, block_d, block_k, group, warps, stages = _INTERPRETED_TILES if INTERPRETED else TILES
    columns = triton.cdiv(latents, block_d)
    residual = hidden.new_empty((tokens, latents) if keep else 0)
    partials = hidden.new_empty((columns, tokens), dtype=accumulate)
    if tokens:
        _residual_kernel[(triton.cdiv(tokens, block_t) * columns,)](
            hidden, weight, bias, target, token_weight.contiguous(), residual, partials,
            tokens, width, latents, hidden.stride(0), weight.stride(0), target.stride(0),
            HAS_BIAS=bias is not None, STORE=keep, UPCAST=INTERPRETED,
            ACCUMULATE=tl.float64 if accumulate == torch.float64 else tl.float32,
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_K=block_k, GROUP=group,
            num_warps=warps, num_stages=stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    squares = partials.sum(dim=0) / latents
    return (squares * token_weight.to(accumulate)).sum(), squares, residual


@_fused.register_fake
def _(hidden, weight, bias, target, token_weight, keep):
    accumulate = _accumulator(hidden)
    residual = hidden.new_empty((hidden.shape[0], weight.shape[0]) if keep else 0)
    return hidden.new_empty((), dtype=accumulate), hidden.new_empty(hidden.shape[0], dtype=accumulate), residual


def _save(ctx, inputs, output) -> None:
    hidden, weight, *_ = inputs
    _, squares, residual = output
    # The parameter itself, never a copy: under ZeRO-3 it is empty between forward and backward, and gathered again.
    ctx.save_for_backward(hidden, weight, residual, squares)


def _backward(ctx, total_gradient, squares_gradient, residual_gradient):
    """dH = d (s W), dW = s (d^T h), db = s sum_t d with d = token_weight * r and s = 2 dL / D.

    s stays on the device and meets only D x K tensors: nothing of size T x D is rescaled, the host never waits.
    """
    hidden, weight, d, squares = ctx.saved_tensors
    need_hidden, need_weight, need_bias, need_target, need_token_weight, _ = ctx.needs_input_grad
    scale = 2 * total_gradient / weight.shape[0]
    accumulate = _accumulator(hidden)
    return (
        d @ (weight * scale).to(d.dtype) if need_hidden else None,
        ((d.T @ hidden).to(accumulate) * scale).to(weight.dtype) if need_weight else None,
        (d.sum(dim=0, dtype=accumulate) * scale).to(weight.dtype) if need_bias else None,
        -d * scale if need_target else None,
        total_gradient * squares if need_token_weight else None,
        None,
    )


_fused.register_autograd(_backward, setup_context=_save)


class PatchLatentHead(nn.Linear):
    """The linear head. Its forward returns the loss, so that ZeRO-3 gathers the weight for both passes."""

    def __init__(self, width: int, provider: Provider = "reference") -> None:
        super().__init__(width, width)
        self.provider: Provider = provider

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: Tensor | float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predictions for `hidden` [..., D], or with a target the loss and token losses of `patch_latent_loss`."""
        if target is None:
            return F.linear(hidden, self.weight, self.bias)
        width = hidden.shape[-1]
        if token_weight is None:
            token_weight = torch.ones(hidden.shape[:-1], device=hidden.device)
        return patch_latent_loss(
            hidden.reshape(-1, width),
            self.weight,
            self.bias,
            target.reshape(-1, width),
            token_weight.reshape(-1),
            normalizer,
            self.provider,
        )
