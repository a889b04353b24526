"""Replacement of masked patch latents by the mask token, plus the position table, as one operation.

Legend: B samples, N patches, D width of the latents, g the gradient of the result.

One pass forward and one backward. Eager PyTorch stores the mixture before it adds the positions, and reads g once per
gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .runtime import INTERPRETED, accumulator, check_device, tl, triton, triton_accumulator

Provider = Literal["reference", "triton"]


def mask_mix(
    latents: Tensor, mask: Tensor, mask_token: Tensor, positions: Tensor | None, provider: Provider = "reference"
) -> Tensor:
    """The mask token where `mask` is True, the latents elsewhere, plus the positions, in the dtype of the latents.

    latents [B, N, D]; mask bool [B, N]; mask_token [1, 1, D]; positions [1, N, D] or None. Returns [B, N, D].
    Masked latents do not affect the result, whatever their values (even NaN), and their gradient is zero.

    provider: `reference` is plain PyTorch; `triton` the fused kernel, interpreted without a GPU. The kernel adds in
    fp32 (fp64 for fp64 latents) and rounds once; plain PyTorch rounds token and positions first.
    """
    if provider == "triton":
        return _fused(latents, mask, mask_token, positions)
    mixed = torch.where(mask[..., None], mask_token.to(latents.dtype), latents)
    return mixed if positions is None else mixed + positions.to(latents.dtype)


@triton.jit
def _forward_kernel(
    latents, mask, token, positions, mixed,
    ROWS, N, D, stride_sample, stride_patch, stride_position,
    HAS_POSITIONS: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the result, which has ROWS = B * N rows. Masked latents are not loaded."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # ROWS * D may exceed 2^31
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real_row, real_d = row < ROWS, d < D
    inside = real_row[:, None] & real_d[None, :]
    masked = tl.load(mask + row, mask=real_row, other=0).to(tl.int1)
    sample, patch = row // N, row % N
    place = (sample * stride_sample + patch * stride_patch)[:, None] + d[None, :]
    value = tl.load(latents + place, mask=inside & (masked == 0)[:, None], other=0.0).to(ACCUMULATE)
    substitute = tl.load(token + d, mask=real_d, other=0.0).to(ACCUMULATE)
    value = tl.where(masked[:, None], substitute[None, :], value)
    if HAS_POSITIONS:
        place = (patch * stride_position)[:, None] + d[None, :]
        value += tl.load(positions + place, mask=inside, other=0.0).to(ACCUMULATE)
    tl.store(mixed + row[:, None] * D + d[None, :], value.to(mixed.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gradient, mask, d_latents, d_positions, partials,
    B, N, D, stride_sample, stride_patch,
    NEED_LATENTS: tl.constexpr, NEED_TOKEN: tl.constexpr, NEED_POSITIONS: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of patches and columns, looping over all samples.

    Stores the sum of the masked rows to partials [N tiles, D]. No atomics: bitwise deterministic.
    """
    tile = tl.program_id(0).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real_n, real_d = n < N, d < D
    inside = real_n[:, None] & real_d[None, :]
    over_all = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACCUMULATE)
    over_masked = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACCUMULATE)
    for b in range(B):
        row = n + tl.cast(b, tl.int64) * N
        masked = tl.load(mask + row, mask=real_n, other=0).to(tl.int1)
        place = tl.cast(b, tl.int64) * stride_sample + n[:, None] * stride_patch + d[None, :]
        g = tl.load(gradient + place, mask=inside, other=0.0).to(ACCUMULATE)
        if NEED_LATENTS:
            visible = tl.where(masked[:, None], 0.0, g).to(d_latents.dtype.element_ty)
            tl.store(d_latents + row[:, None] * D + d[None, :], visible, mask=inside)
        if NEED_TOKEN:
            over_masked += tl.where(masked[:, None], g, 0.0)
        if NEED_POSITIONS:
            over_all += g
    if NEED_TOKEN:
        tl.store(partials + tile * D + d, tl.sum(over_masked, axis=0), mask=real_d)
    if NEED_POSITIONS:
        tl.store(d_positions + n[:, None] * D + d[None, :], over_all.to(d_positions.dtype.element_ty), mask=inside)


# Rows, columns, warps.
TILES = (8, 256, 4)
_INTERPRETED_TILES = (32, 64, 4)


@torch.library.custom_op(
    "bifrost::mask_mix",
    mutates_args=(),
    schema="(Tensor latents, Tensor mask, Tensor mask_token, Tensor? positions) -> Tensor",
)
def _fused(latents, mask, mask_token, positions):
    check_device(latents.device)
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}"
    samples, patches, width = latents.shape
    assert mask.shape == (samples, patches), f"mask is {tuple(mask.shape)}, latents {tuple(latents.shape)}"
    assert mask_token.numel() == width, f"mask_token is {tuple(mask_token.shape)}, latents {tuple(latents.shape)}"
    assert positions is None or positions.shape == (1, patches, width), f"positions is {tuple(positions.shape)}"
    mixed = latents.new_empty(latents.shape)
    if mixed.numel():
        latents = latents if latents.stride(-1) == 1 else latents.contiguous()
        if positions is not None and positions.stride(-1) != 1:
            positions = positions.contiguous()
        block_n, block_d, warps = _INTERPRETED_TILES if INTERPRETED else TILES
        rows = samples * patches
        _forward_kernel[(triton.cdiv(rows, block_n), triton.cdiv(width, block_d))](
            latents, mask.contiguous(), mask_token.contiguous(), positions, mixed,
            rows, patches, width, latents.stride(0), latents.stride(1),
            0 if positions is None else positions.stride(1),
            HAS_POSITIONS=positions is not None,
            ACCUMULATE=triton_accumulator(latents),
            BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return mixed


@_fused.register_fake
def _(latents, mask, mask_token, positions):
    return latents.new_empty(latents.shape)


@torch.library.custom_op(
    "bifrost::mask_mix_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor mask, bool need_latents, bool need_token, bool need_positions)"
    " -> (Tensor, Tensor, Tensor)",
)
def _fused_backward(gradient, mask, need_latents, need_token, need_positions):
    """dLatents [B, N, D] in the gradient's dtype; dToken [D] and dPositions [N, D] in fp32. Empty if not needed."""
    samples, patches, width = gradient.shape
    accumulate = accumulator(gradient)
    block_n, block_d, warps = _INTERPRETED_TILES if INTERPRETED else TILES
    tiles = triton.cdiv(patches, block_n)
    d_latents = gradient.new_empty(gradient.shape if need_latents else 0)
    d_positions = gradient.new_empty((patches, width) if need_positions else 0, dtype=accumulate)
    partials = gradient.new_empty((tiles, width) if need_token else (0, 0), dtype=accumulate)
    if patches and width and (need_latents or need_token or need_positions):
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        _backward_kernel[(tiles, triton.cdiv(width, block_d))](
            gradient, mask.contiguous(), d_latents, d_positions, partials,
            samples, patches, width, gradient.stride(0), gradient.stride(1),
            NEED_LATENTS=need_latents, NEED_TOKEN=need_token, NEED_POSITIONS=need_positions,
            ACCUMULATE=triton_accumulator(gradient),
            BLOCK_N=block_n, BLOCK_D=block_d,
            num_warps=warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return d_latents, partials.sum(dim=0), d_positions


@_fused_backward.register_fake
def _(gradient, mask, need_latents, need_token, need_positions):
    _, patches, width = gradient.shape
    accumulate = accumulator(gradient)
    return (
        gradient.new_empty(gradient.shape if need_latents else 0),
        gradient.new_empty(width if need_token else 0, dtype=accumulate),
        gradient.new_empty((patches, width) if need_positions else 0, dtype=accumulate),
    )


def _save(ctx, inputs, output) -> None:
    _, mask, mask_token, positions = inputs
    ctx.save_for_backward(mask)
    ctx.token = mask_token.shape, mask_token.dtype
    ctx.positions_dtype = None if positions is None else positions.dtype


def _backward(ctx, gradient):
    (mask,) = ctx.saved_tensors
    need_latents, _, need_token, need_positions = ctx.needs_input_grad
    d_latents, d_token, d_positions = _fused_backward(gradient, mask, need_latents, need_token, need_positions)
    shape, dtype = ctx.token
    return (
        d_latents if need_latents else None,
        None,
        d_token.to(dtype).reshape(shape) if need_token else None,
        d_positions.to(ctx.positions_dtype)[None] if need_positions else None,
    )


_fused.register_autograd(_backward, setup_context=_save)
