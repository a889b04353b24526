"""Triton kernels of the patch-latent loss: a GEMM that computes the residual in its epilogue, and the epilogue alone.

Legend as in `latent_loss`: T tokens, K width of the hidden states, D width of the latents, r = hidden W^T + b - target.

Each output element is written once, by one program, in a fixed order: without atomics, so results are bitwise
deterministic. Sums over columns and rows are stored as partial sums in the accumulator dtype and added up afterwards.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (in a kernel, numbers are compiler constants and `tl.range` is not a Python iterator)

from __future__ import annotations

from typing import NamedTuple

from .runtime import tl, triton


class Tiles(NamedTuple):
    """Tile sizes and launch parameters of a kernel."""

    rows: int
    columns: int
    depth: int = 0
    """Columns of hidden per step of the GEMM."""
    group: int = 1
    """Number of row tiles that are traversed column by column."""
    slices: int = 1
    """Number of column slices that the epilogue processes in sequence."""
    warps: int = 4
    stages: int = 1


# As compiled for sm_90, bf16, with all outputs stored. With four slices the specialized GEMM does not spill (with two:
# 144 bytes), and the pointer GEMM uses 128 registers per thread (with one: 186), so that two programs fit on a
# multiprocessor. Two of triton-tma-pair fit as well: one multiplies while the other runs its epilogue. triton-tma, of
# which one fits, reads a quarter less from the L2 cache per product. It has more rows than columns, so that a thread
# adds four rows of a column, not two, before threads exchange their sums.
TILES = {
    "in-place": Tiles(64, 128, warps=8),
    "triton": Tiles(128, 128, 64, group=8, slices=4, warps=8, stages=3),
    "triton-tma": Tiles(256, 128, 64, group=8, warps=8, stages=3),
    "triton-tma-pair": Tiles(128, 128, 64, group=8, warps=4, stages=3),
    "triton-ws": Tiles(128, 256, 64, group=8, slices=4, warps=4, stages=3),
}
_INTERPRETED = Tiles(64, 64, 64, group=8, slices=2)


def tiles(provider: str, itemsize: int, capability: int) -> Tiles:
    """Tiles of `provider` for operands of `itemsize` bytes on compute capability `capability`.x; 0: interpreted."""
    if not capability:
        return _INTERPRETED
    found = TILES[provider]
    if itemsize == 4 and found.depth:  # not on tensor cores, and larger tiles spill
        found = found._replace(rows=64, columns=64, depth=32, slices=1)
    if provider == "triton-ws" and capability == 10:
        # For sm_90 the compiler expands four warps to twelve, and does not specialize eight. For sm_100 it expands
        # eight warps to twelve; four are expanded to eight, which spill 760 bytes.
        found = found._replace(warps=8)
    if provider == "triton-tma" and capability == 10:
        found = found._replace(slices=4)  # in one piece the epilogue spills 20 bytes there
    return found


@triton.jit
def _tile(T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program. Concurrent programs share weights: GROUP row tiles, column by column."""
    pid = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D)
    first = pid // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    return first + pid % (GROUP * column_tiles) % height, pid % (GROUP * column_tiles) // height


@triton.jit
def _finish(
    total, tile_t, first_t, first_d, bias, target, token_weight, residual, column_sums, T, D, stride_target,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, HAS_BIAS: tl.constexpr, STORE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The epilogue of one tile `total` [ROWS, COLUMNS] of hidden W^T: returns the sums of r^2 per row [ROWS].

    Stores d = token_weight * r to residual [T, D] and its sum over the tile's rows to column_sums [row tiles, D]. With
    DESCRIPTORS, target and residual are tensor descriptors of [ROWS, COLUMNS / SLICES], else pointers.
    """
    if SLICES > 1:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
        squares = _finish(
            left, tile_t, first_t, first_d, bias, target, token_weight, residual, column_sums, T, D, stride_target,
            ROWS, HALF, SLICES // 2, HAS_BIAS, STORE, SUM_COLUMNS, ACCUMULATE, DESCRIPTORS,
        )  # fmt: skip
        squares += _finish(
            right, tile_t, first_t, first_d + HALF, bias, target, token_weight, residual, column_sums, T, D,
            stride_target, ROWS, HALF, SLICES // 2, HAS_BIAS, STORE, SUM_COLUMNS, ACCUMULATE, DESCRIPTORS,
        )  # fmt: skip
    else:
        t, d = first_t + tl.arange(0, ROWS), first_d + tl.arange(0, COLUMNS)
        rows = t.to(tl.int64)[:, None]  # T * D may exceed 2^31
        real_t, real_d = t < T, d < D
        inside = real_t[:, None] & real_d[None, :]
        if HAS_BIAS:
            total += tl.load(bias + d, mask=real_d, other=0.0).to(ACCUMULATE)[None, :]
        if DESCRIPTORS:
            wanted = target.load([first_t, first_d])  # zero outside the tensor
        else:
            wanted = tl.load(target + rows * stride_target + d[None, :], mask=inside, other=0.0)
        total -= wanted.to(ACCUMULATE)
        squares = tl.sum(total * total, axis=1)
        if STORE or SUM_COLUMNS:  # beyond D everything is zero; rows beyond T hold the bias, with weight 0
            total *= tl.load(token_weight + t, mask=real_t, other=0.0).to(ACCUMULATE)[:, None]
        if STORE and DESCRIPTORS:
            residual.store([first_t, first_d], total.to(residual.dtype))
        elif STORE:
            tl.store(residual + rows * D + d[None, :], total.to(residual.dtype.element_ty), mask=inside)
        if SUM_COLUMNS:
            tl.store(column_sums + tile_t.to(tl.int64) * D + d, tl.sum(total, axis=0), mask=real_d)
    return squares


@triton.jit
def pointer_kernel(
    hidden, weight, bias, target, token_weight, residual, row_sums, column_sums,
    T, K, D, stride_hidden, stride_weight, stride_target,
    HAS_BIAS: tl.constexpr, STORE: tl.constexpr, SUM_COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """One tile of r, with operands loaded through pointers. Stores the sums of r^2 to row_sums [column tiles, T]."""
    tile_t, tile_d = _tile(T, D, BLOCK_T, BLOCK_D, GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    real_t, real_d = t < T, d < D
    rows = t.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACCUMULATE)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(hidden + rows * stride_hidden + k[None, :], mask=real_t[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(
            weight + d[None, :] * stride_weight + k[:, None], mask=real_d[None, :] & (k < K)[:, None], other=0.0
        )
        if UPCAST:  # the interpreter multiplies bf16 incorrectly
            h, w = h.to(ACCUMULATE), w.to(ACCUMULATE)
        total = tl.dot(h, w, total, input_precision="ieee", out_dtype=ACCUMULATE)
    squares = _finish(
        total, tile_t, tile_t * BLOCK_T, tile_d * BLOCK_D, bias, target, token_weight, residual, column_sums, T, D,
        stride_target, BLOCK_T, BLOCK_D, SLICES, HAS_BIAS, STORE, SUM_COLUMNS, ACCUMULATE, False,
    )  # fmt: skip
    tl.store(row_sums + tile_d.to(tl.int64) * T + t, squares, mask=real_t)


@triton.jit
def descriptor_kernel(
    hidden, weight, bias, target, token_weight, residual, row_sums, column_sums,
    T, K, D, stride_hidden, stride_weight, stride_target,
    HAS_BIAS: tl.constexpr, STORE: tl.constexpr, SUM_COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SLICES: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors: hidden [BLOCK_T, BLOCK_K], weight [BLOCK_D, BLOCK_K], target and residual.

    The host creates them. For warp specialization all are pointers, because the compiler splits a load between two warp
    groups and cannot split a descriptor that it did not create; target and residual are then used as pointers.
    """
    tile_t, tile_d = _tile(T, D, BLOCK_T, BLOCK_D, GROUP)
    first_t, first_d = tile_t * BLOCK_T, tile_d * BLOCK_D
    if WARP_SPECIALIZE:
        hidden = tl.make_tensor_descriptor(hidden, [T, K], [stride_hidden, 1], [BLOCK_T, BLOCK_K])
        weight = tl.make_tensor_descriptor(weight, [D, K], [stride_weight, 1], [BLOCK_D, BLOCK_K])
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACCUMULATE)
    for start in tl.range(0, K, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
        h, w = hidden.load([first_t, start]), weight.load([first_d, start])  # zero outside the tensor
        if UPCAST:
            h, w = h.to(ACCUMULATE), w.to(ACCUMULATE)
        total = tl.dot(h, w.T, total, input_precision="ieee", out_dtype=ACCUMULATE)
    squares = _finish(
        total, tile_t, first_t, first_d, bias, target, token_weight, residual, column_sums, T, D,
        stride_target, BLOCK_T, BLOCK_D, SLICES, HAS_BIAS, STORE, SUM_COLUMNS, ACCUMULATE, not WARP_SPECIALIZE,
    )  # fmt: skip
    t = first_t + tl.arange(0, BLOCK_T)
    tl.store(row_sums + tile_d.to(tl.int64) * T + t, squares, mask=t < T)


@triton.jit
def inplace_kernel(
    prediction, target, token_weight, row_sums, column_sums,
    T, D, stride_target,
    STORE: tl.constexpr, SUM_COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The epilogue alone: overwrites prediction [T, D], contiguous and with bias, by d; only reads it without STORE."""
    tile_t, tile_d = _tile(T, D, BLOCK_T, BLOCK_D, 1)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    total = tl.load(prediction + t.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(ACCUMULATE)
    squares = _finish(
        total, tile_t, tile_t * BLOCK_T, tile_d * BLOCK_D, None, target, token_weight, prediction, column_sums, T, D,
        stride_target, BLOCK_T, BLOCK_D, 1, False, STORE, SUM_COLUMNS, ACCUMULATE, False,
    )  # fmt: skip
    tl.store(row_sums + tile_d.to(tl.int64) * T + t, squares, mask=t < T)
