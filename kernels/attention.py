"""Attention over packed samples: images over a text prefix and themselves, causal text, windows of a vision encoder.

Samples of different lengths are concatenated; there is no padding and no mask tensor. The hybrid mask of the public
release (text causal, images attending to their text and to all of themselves) is split exactly into two calls without a
mask tensor: text over text, causal, and images over text and image together.

Legend: S rows of a packed tensor, H query heads, G key heads (H a multiple of G), C head width, B samples, T text
tokens of a sample, K images of a sample, N patches of an image.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .dense_attention import dense_attention, dense_is_faster

Backend = Literal["varlen", "flash-attn-4", "flash-attn-3", "flash-attn-2", "sdpa", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""`varlen`: FlashAttention in torch; `flash-attn-N`: the package of that version, if installed; `sdpa`: one call of
torch's scaled_dot_product_attention per length; `reference`: dense scores in fp32."""


@dataclass(frozen=True)
class Segments:
    """Samples in a packed tensor: `lengths` on the host, cumulative `ends` int32 [B + 1] from 0 on the device."""

    lengths: tuple[int, ...]
    ends: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), to_device(ends, device))

    @property
    def longest(self) -> int:
        return max(self.lengths) if self.lengths else 0  # torch.compile cannot trace max's default

    @property
    def total(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class PrefixLayout:
    """Positions of the tokens of B samples with T_i text tokens and K images of N patches each.

    The images of a sample follow each other, and each attends to the sample's text and to itself: `image` and `both`
    have B K segments. text_rows [K, sum T], image_rows [B K N]: rows of the text tokens and patches in `both`, int64;
    positions [sum T]: position of each text token in its text.
    """

    text: Segments
    image: Segments
    both: Segments
    text_rows: Tensor
    image_rows: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls, lengths: Sequence[int], patches: int, device: torch.device | str = "cpu", images: int = 1
    ) -> PrefixLayout:
        """lengths: T_i of each sample; patches: N; images: K."""
        count = torch.tensor(lengths, dtype=torch.int64)
        begin = count.cumsum(0) - count
        positions = torch.arange(int(count.sum())) - begin.repeat_interleave(count)
        each = count.repeat_interleave(images)
        ends = each.cumsum(0)
        first = (ends - each + torch.arange(len(each)) * patches).view(-1, images).T  # row of each image's text, [K, B]
        text_rows = first.repeat_interleave(count, dim=1) + positions
        image_rows = torch.arange(len(each) * patches) + ends.repeat_interleave(patches)
        return cls(
            Segments.of(lengths, device),
            Segments.of([patches] * len(each), device),
            Segments.of([length + patches for length in lengths for _ in range(images)], device),
            *(to_device(index, device) for index in (text_rows, image_rows, positions)),
        )


def to_device(table: Tensor, device: torch.device | str) -> Tensor:
    """A table of the host on `device`. From pageable memory the host may wait for a copy, from 64 KiB on."""
    if torch.device(device).type == "cuda":
        table = table.pin_memory()  # a block of torch's host allocator, reused after the copy
    return table.to(device, non_blocking=True)


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    layout: PrefixLayout,
    scale: float,
    backend: Backend = "sdpa",
) -> Tensor:
    """Every patch attends to all text tokens of its sample and all patches of its image.

    query [B K N, H, C]; key, value [B K N, G, C] of the patches; text_key, text_value [sum T, G, C]. Returns
    [B K N, H, C].
    Differentiable in query, key and value, and in text_key and text_value if they require gradients.
    """
    keys: Any = _Interleaved.apply(text_key, key, layout)
    values: Any = _Interleaved.apply(text_value, value, layout)
    return segment_attention(query, keys, values, layout.image, layout.both, False, scale, backend)


class _Interleaved(torch.autograd.Function):
    """Text and patches of each image concatenated, [K sum T + B K N, G, C]: attention without a mask needs them next to
    each other. Saves no tensors for the backward pass, which is a plain gather; `index_copy` would save its source."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, image: Tensor, layout: PrefixLayout) -> Tensor:
        ctx.layout = layout
        both = text.new_empty(layout.both.total, *text.shape[1:])  # every row is written once
        for rows in layout.text_rows:
            both.index_copy_(0, rows, text)
        return both.index_copy_(0, layout.image_rows, image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (for_text, for_image, _) = gradients, ctx.needs_input_grad
        rows: Tensor = ctx.layout.text_rows
        return (
            gradient.index_select(0, rows.flatten()).unflatten(0, rows.shape).sum(0) if for_text else None,
            gradient.index_select(0, ctx.layout.image_rows) if for_image else None,
            None,
        )


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Segments,
    keys: Segments,
    causal: bool,
    scale: float,
    backend: Backend = "sdpa",
) -> Tensor:
    """Attention of each segment of `query` [S, H, C] over the same segment of `key` and `value` [S', G, C].

    causal: a row attends to itself and earlier rows; both sides then have the same lengths. Returns [S, H, C].
    """
    assert not causal or queries.lengths == keys.lengths, "causal attention needs as many keys as queries"
    if not query.shape[0]:
        return query.new_empty(query.shape)
    if backend not in _RUN:
        _resolve(backend)
    return _RUN[backend](query, key, value, queries, keys, causal, scale)


def unavailable(backend: Backend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device` in `dtype`, in one line; None if it can."""
    if backend in ("sdpa", "reference"):
        return None
    if device.type != "cuda":
        return f"{backend} needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{backend} supports bf16 and fp16 only, not {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{backend} needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    found = _varlen_function(backend)
    if isinstance(found, str):
        return found
    if torch.are_deterministic_algorithms_enabled() and backend != "varlen" and not _takes(found, "deterministic"):
        return f"{backend}: this version's backward pass cannot be made deterministic"
    return None


_SOURCES = {
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash-attn-2": ("flash_attn", "flash_attn_varlen_func"),
}


@lru_cache
def _varlen_function(backend: str) -> Callable[..., Any] | str:
    """The library's function, or the reason why it is unavailable."""
    module, name = _SOURCES[backend]
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # these packages fail in many ways when versions do not match
        return f"{backend}: {module}.{name} cannot be imported ({type(error).__name__}: {error})"


def _takes(function: Callable[..., Any], setting: str) -> bool:
    return setting in inspect.signature(function).parameters


def _varlen(function: Callable[..., Any]) -> Callable[..., Tensor]:
    groups = _takes(function, "enable_gqa")  # not in torch 2.11

    def run(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
        settings: dict[str, Any] = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
        if query.shape[1] != key.shape[1]:
            if groups:
                settings["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        return function(query, key, value, queries.ends, keys.ends, queries.longest, keys.longest, **settings)

    return run


def _package(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Unlike torch's own attention, these packages take determinism as an argument instead of torch's global switch."""
    switch = _takes(function, "deterministic")

    def run(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        assert switch or not deterministic, "refused by `unavailable`"
        out = function(
            query,
            key,
            value,
            cu_seqlens_q=queries.ends,
            cu_seqlens_k=keys.ends,
            max_seqlen_q=queries.longest,
            max_seqlen_k=keys.longest,
            softmax_scale=scale,
            causal=causal,
            **({"deterministic": deterministic} if switch else {}),
        )
        return out[0] if isinstance(out, tuple) else out

    return run


def _sdpa(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
    if dense_is_faster(keys.longest, query.device, query.dtype):
        return _padded(query, key, value, queries, keys, causal, scale)
    return _sdpa_calls(query, key, value, queries, keys, causal, scale)


def _padded(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
    """All segments in one call, padded to the longest."""
    equal = len(set(keys.lengths)) == len(set(queries.lengths)) == 1
    at, key_at = _padded_rows(queries, query.device), _padded_rows(keys, key.device)
    q, k, v = _pad(query, queries, at), _pad(key, keys, key_at), _pad(value, keys, key_at)
    seen = None if equal else (torch.arange(keys.longest) < torch.tensor(keys.lengths)[:, None])[:, None]
    if causal:
        earlier = torch.ones(queries.longest, keys.longest, dtype=torch.bool).tril_()[None]
        seen = earlier if seen is None else seen & earlier
    out = dense_attention(q, k, v, scale, seen).flatten(0, 1)
    return out if at is None else out.index_select(0, at)


def _padded_rows(segments: Segments, device: torch.device) -> Tensor | None:
    """Where each row is after padding to the longest segment; None if nothing has to be added."""
    if segments.total == len(segments.lengths) * segments.longest:
        return None
    sample, place = _places(segments, device)
    return sample * segments.longest + place


def _pad(x: Tensor, segments: Segments, at: Tensor | None) -> Tensor:
    """Rows [S, H, C] as [B, longest, H, C], zero after the end of a segment. at: see `_padded_rows`."""
    shape = len(segments.lengths), segments.longest
    if at is not None:
        x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, at, x)
    return x.unflatten(0, shape)


def _sdpa_calls(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
    """Segments of equal length are batched into a single call; ragged ones are processed in a loop."""
    grouped = query.shape[1] != key.shape[1]
    shapes = set(zip(queries.lengths, keys.lengths, strict=True))
    if len(shapes) == 1:
        ((rows, columns),) = shapes
        q = query.unflatten(0, (-1, rows)).transpose(1, 2)
        k, v = (x.unflatten(0, (-1, columns)).transpose(1, 2) for x in (key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    parts = zip(query.split(queries.lengths), key.split(keys.lengths), value.split(keys.lengths), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in part), scale=scale, is_causal=causal, enable_gqa=grouped
            )[0].transpose(0, 1)
            for part in parts
        ]
    )


def _reference(query, key, value, queries: Segments, keys: Segments, causal: bool, scale: float) -> Tensor:
    """Dense scores over all samples, [H, S, S'], in fp32 (fp64 for fp64 inputs), with an explicit mask."""
    accumulate = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(accumulate).transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    (sample_q, place_q), (sample_k, place_k) = (_places(segments, query.device) for segments in (queries, keys))
    seen = sample_q[:, None] == sample_k[None, :]
    if causal:
        seen &= place_q[:, None] >= place_k[None, :]
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)


def _places(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sample of each row, and the row's position in it."""
    lengths = torch.tensor(segments.lengths, device=device)
    sample = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    return sample, torch.arange(len(sample), device=device) - (lengths.cumsum(0) - lengths)[sample]


_RUN: dict[str, Callable[..., Tensor]] = {"sdpa": _sdpa, "reference": _reference}
"""Library backends are added on first use, so that torch.compile traces a plain function."""


def _resolve(backend: Backend) -> None:
    function = _varlen_function(backend)
    assert callable(function), function
    _RUN[backend] = _varlen(function) if backend == "varlen" else _package(function)
