"""Projection of hidden states to patch latents and its squared error, as one operation.

Legend: T tokens (all patches of a micro-batch in one row), K width of the hidden states, D width of the latents
(equal to K in Bifrost-1), r = hidden W^T + b - target.

The Triton GEMMs compute the residual in their epilogue from the fp32 accumulator and store it once, rounded to the
compute dtype. Eager PyTorch rounds the prediction before the subtraction, so its residual carries that rounding error:
the closer the prediction, the larger the relative error of the gradient. The in-place pass also starts from the
library's rounded prediction and has eager's error, at a quarter of its memory traffic.
"""

from __future__ import annotations

import contextvars
import functools
import logging
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .latent_loss_triton import descriptor_kernel, inplace_kernel, pointer_kernel, tiles
from .runtime import INTERPRETED, accumulator, check_device, triton, triton_accumulator

Provider = Literal["reference", "in-place", "triton", "triton-tma", "triton-tma-pair", "triton-ws"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
_DESCRIPTORS = ("triton-tma", "triton-tma-pair", "triton-ws")

logger = logging.getLogger(__name__)


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

    hidden [T, K]; weight [D, K]; bias [D] or None; target [T, D]; token_weight [T]; normalizer: number of tokens in the
    mean, which under data parallelism is not T. Returns the loss [] and the unweighted mean squared error per token
    [T], detached. fp64 inputs are computed in fp64.

    provider: `reference` is plain PyTorch; `in-place` the library's GEMM and one pass over its output; `triton` a GEMM
    with the loss as its epilogue; `triton-tma` the same with tensor descriptors; `triton-tma-pair` with smaller tiles,
    two at a time on a multiprocessor; `triton-ws` with warp specialization. All but the first are interpreted without a
    GPU; see `unavailable` for their other requirements.
    """
    if provider != "reference":
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        training = torch.is_grad_enabled()
        keep = training and any(x.requires_grad for x in (hidden, weight, target))  # only for a backward pass
        sum_columns = training and bias is not None and bias.requires_grad
        total, squares, *_ = _fused(hidden, weight, bias, target, token_weight, provider, keep, sum_columns)
        return total / normalizer, squares.detach()
    accumulate = accumulator(hidden)
    prediction = F.linear(hidden, weight, bias)
    squares = (prediction.to(accumulate) - target.to(accumulate)).square().mean(dim=-1)
    return (squares * token_weight.to(accumulate)).sum() / normalizer, squares.detach()


def unavailable(provider: Provider, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `provider` cannot compute in `dtype` on `device`, in one line; None if it can."""
    if provider == "reference":
        return None
    try:
        check_device(device)
    except RuntimeError as error:
        return str(error)
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"{provider} runs on CUDA devices, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{provider} computes in bf16, fp16 and fp32, not in {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{provider} needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if provider in _DESCRIPTORS:
        if dtype == torch.float32:
            return f"{provider} computes in bf16 and fp16: fp32 does not run on tensor cores"
        if capability[0] not in (9, 10) or torch.version.hip:  # 12.x has half the shared memory that the tiles need
            return f"{provider} needs compute capability 9.0 or 10.x, this GPU has {capability[0]}.{capability[1]}"
        if provider == "triton-ws" and not halves_epilogue():
            return f"{provider} needs Triton 3.7, whose compiler can halve the epilogue; this is {triton.__version__}"
    return None


def halves_epilogue() -> bool:
    """Whether Triton's compiler can halve the epilogue, which triton-ws needs."""
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@torch.library.custom_op(
    "bifrost::patch_latent_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor token_weight, str provider, bool keep,"
    " bool sum_columns) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _fused(hidden, weight, bias, target, token_weight, provider, keep, sum_columns):
    """Weighted sum of mean squares [], mean squares [T], d = token_weight * r [T, D], and the sum of d over tokens [D].

    d is empty unless `keep`, its sum unless `sum_columns`.
    """
    reason = unavailable(provider, hidden.device, hidden.dtype)
    if reason is not None:
        raise RuntimeError(reason)
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}"
    accumulate = accumulator(hidden)
    hidden, weight, target = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight, target))
    if provider in _DESCRIPTORS:
        reason = _no_descriptor(hidden) or _no_descriptor(weight) or _no_descriptor(target)
        if reason is None and weight.shape[0] * hidden.element_size() % 16:
            reason = f"rows of {weight.shape[0]} elements of {hidden.dtype} are not a multiple of 16 bytes"
        if reason is not None:
            _warn_once(f"{provider} falls back to triton: {reason}")
            provider = "triton"
    # On Hopper the compiler splits the rows of a specialized tile among warp groups and cannot sum over them.
    sum_stored = sum_columns and provider == "triton-ws"
    store, token_weight = keep or sum_stored, token_weight.contiguous()
    d, row_sums, column_sums = _launch(
        provider, hidden, weight, bias, target, token_weight, store, sum_columns and not sum_stored
    )
    squares = row_sums.sum(dim=0) / weight.shape[0]
    if sum_stored:
        column_sums = d
    return (
        (squares * token_weight.to(accumulate)).sum(),
        squares,
        d.to(hidden.dtype) if keep else hidden.new_empty(0),
        column_sums.sum(dim=0, dtype=accumulate) if sum_columns else squares.new_empty(0),
    )


def _launch(
    provider: Provider,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    store: bool,
    sum_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d [T, D], partial sums of r^2 [column tiles, T] and of d [row tiles, D]; undefined if not requested."""
    (tokens, width), latents, accumulate = hidden.shape, weight.shape[0], accumulator(hidden)
    capability = 0 if INTERPRETED else torch.cuda.get_device_capability(hidden.device)[0]
    tile = tiles(provider, hidden.element_size(), capability)
    row_tiles, column_tiles = -(-tokens // tile.rows), -(-latents // tile.columns)
    row_sums = hidden.new_empty((column_tiles, tokens), dtype=accumulate)
    column_sums = hidden.new_empty((row_tiles, latents) if sum_columns else 0, dtype=accumulate)
    stored = accumulate if INTERPRETED else hidden.dtype  # the interpreter truncates to bf16 where a GPU rounds
    if provider == "in-place":
        d = F.linear(hidden, weight, bias).to(stored)
    else:
        d = hidden.new_empty((tokens, latents) if store else 0, dtype=stored)
    if not tokens:
        return d, row_sums, column_sums
    grid = (row_tiles * column_tiles,)
    options: dict[str, Any] = {
        "STORE": store, "SUM_COLUMNS": sum_columns, "BLOCK_T": tile.rows, "BLOCK_D": tile.columns,
        "ACCUMULATE": triton_accumulator(hidden),
        "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True,  # not every version's default
    }  # fmt: skip
    if provider == "in-place":
        outputs = (row_sums, column_sums)
        inplace_kernel[grid](d, target, token_weight, *outputs, tokens, latents, target.stride(0), **options)
        return d, row_sums, column_sums
    options |= {"HAS_BIAS": bias is not None, "UPCAST": INTERPRETED, "SLICES": tile.slices}
    options |= {"BLOCK_K": tile.depth, "GROUP": tile.group}
    loads: dict[str, Any] = {"WARP_SPECIALIZE": provider == "triton-ws"}
    tensors = (hidden, weight, bias, target, token_weight, d)
    rest = (
        row_sums, column_sums, tokens, width, latents, hidden.stride(0), weight.stride(0), target.stride(0),
    )  # fmt: skip
    if provider == "triton":
        pointer_kernel[grid](*tensors, *rest, **options)
    elif provider != "triton-ws":
        slice_shape = [tile.rows, tile.columns // tile.slices]
        described = (
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            bias,
            TensorDescriptor.from_tensor(target, slice_shape),
            token_weight,
            TensorDescriptor.from_tensor(d, slice_shape) if store else d,
        )
        descriptor_kernel[grid](*described, *rest, **loads, **options)
    else:

        def specialized() -> None:  # its descriptors are created on the device, in memory that Triton allocates
            triton.set_allocator(lambda size, alignment, stream: row_sums.new_empty(size, dtype=torch.int8))
            descriptor_kernel[grid](*tensors, *rest, **loads, **options)

        contextvars.copy_context().run(specialized)  # keeps the program's own allocator
    return d, row_sums, column_sums


def _no_descriptor(operand: Tensor) -> str | None:
    """Why `operand` [rows, columns], with contiguous rows, cannot have a tensor descriptor; None if it can."""
    if operand.data_ptr() % 16:
        return "an operand is not aligned to 16 bytes"
    if operand.stride(0) * operand.element_size() % 16 or operand.stride(0) < operand.shape[1]:
        return f"the row stride of {operand.stride(0)} elements of {operand.dtype} is not a multiple of 16 bytes"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


@_fused.register_fake
def _(hidden, weight, bias, target, token_weight, provider, keep, sum_columns):
    (tokens, _), latents, accumulate = hidden.shape, weight.shape[0], accumulator(hidden)
    return (
        hidden.new_empty((), dtype=accumulate),
        hidden.new_empty(tokens, dtype=accumulate),
        hidden.new_empty((tokens, latents) if keep else 0),
        hidden.new_empty(latents if sum_columns else 0, dtype=accumulate),
    )


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # for unused outputs they would be zeros as large as d
    hidden, weight, *_ = inputs
    _, squares, d, columns = output
    # The parameter itself, never a copy: ZeRO-3 frees it between forward and backward, and gathers it again.
    ctx.save_for_backward(hidden, weight, d, squares, columns)


def _backward(ctx, total_gradient, *unused):
    """dH = d (s W), dW = s (d^T h), db = s sum_t d with d = token_weight * r and s = 2 dL / D.

    s stays on the device and scales D x K tensors: nothing of size T x D is rescaled and the host never waits. It
    is multiplied in the accumulator dtype, because PyTorch would round it to 16 bits to multiply a 16-bit tensor.
    """
    if total_gradient is None:  # the differentiated output does not depend on the loss
        return (None,) * 8
    hidden, weight, d, squares, columns = ctx.saved_tensors
    need_hidden, need_weight, need_bias, need_target, need_token_weight, *_ = ctx.needs_input_grad
    scale = 2 * total_gradient / weight.shape[0]

    def scaled(x: Tensor) -> Tensor:
        return (x.to(columns.dtype) * scale).to(d.dtype)

    def scale_(x: Tensor) -> Tensor:  # in place, by blocks of rows: a full fp32 copy would be the peak of memory
        for rows in x.split(1024):
            rows.copy_(rows.to(columns.dtype) * scale)
        return x

    if not need_hidden:
        hidden_gradient = None
    elif d.dtype == torch.float16:
        hidden_gradient = scale_(d @ weight)  # s W would be out of range
    else:
        hidden_gradient = d @ scaled(weight)
    return (
        hidden_gradient,
        scale_(d.T @ hidden) if need_weight else None,
        scaled(columns) if need_bias else None,
        scaled(-d) if need_target else None,
        total_gradient * squares if need_token_weight else None,
        None,
        None,
        None,
    )


_fused.register_autograd(_backward, setup_context=_save)


class PatchLatentHead(nn.Linear):
    """The linear head. Its forward computes the loss, so that ZeRO-3 gathers the weight for both passes."""

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
