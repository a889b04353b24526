"""Benchmark of one attention layer: packed in two calls, against dense scores with the hybrid mask.

Legend as in `attention`: H query heads, G key heads, C head width, B samples, T_i text tokens of a sample, N patches of
an image; S = longest text + N, the length of a padded sample.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import attention
from ..attention import PrefixLayout, prefix_attention, segment_attention
from .cases import (
    PATCHES,
    Candidate,
    Mode,
    Problem,
    Shape,
    Wanted,
    Work,
    compiled,
    copy_floor,
    gemm_floor,
    random_tensors,
)

HEAD_WIDTH = 128
TEXT = (16, 240)
"""Shortest and longest text in tokens; lengths are uniform, 128 on average."""
DENSE = ("eager", "compile", "sdpa-dense")


def text_lengths(samples: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(*TEXT) for _ in range(samples)]


def attention_work(lengths: list[int], heads: int, groups: int, itemsize: int) -> dict[Mode, Work]:
    """4 x rows x columns x H x C FLOPs forward, half of that with a causal mask, 2.5 times as many backward
    (FlashAttention's convention). The text is frozen: forward pass only, no gradient of its keys and values.
    """
    image, text = PATCHES * len(lengths), sum(lengths)
    scores = sum(PATCHES * (length + PATCHES) for length in lengths)
    flops = 4 * HEAD_WIDTH * heads * scores
    causal = 2 * HEAD_WIDTH * heads * sum(length**2 for length in lengths)
    element = HEAD_WIDTH * itemsize
    # q, out; k, v
    forward = Work(flops + causal, element * (image + text) * 2 * (heads + groups))
    # q, out, dout, dq; k, v; dk, dv
    backward = Work(flops * 5 // 2, element * (4 * heads * image + 2 * groups * (image + text) + 2 * groups * image))
    return {"forward": forward, "backward": backward, "full": forward + backward, "no-grad": forward}


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As in the public release: dense scores, an additive mask, softmax in fp32 (fp64 for fp64)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale + mask
    accumulate = torch.promote_types(query.dtype, torch.float32)
    return scores.softmax(-1, dtype=accumulate).to(query.dtype) @ value


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    # Heads are repeated explicitly: torch has no fused kernel for a mask with grouped heads.
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class Padded:
    """The same samples, left-padded to S rows, so that every image occupies the last N."""

    def __init__(self, lengths: list[int], layout: PrefixLayout, device: torch.device) -> None:
        self.samples, self.longest = len(lengths), max(lengths)
        count = torch.tensor(lengths, device=device)
        self.sample = torch.arange(len(lengths), device=device).repeat_interleave(count)
        self.slot = self.longest - count[self.sample] + layout.positions
        self.begin = self.longest - count

    def pack(self, text: Tensor, image: Tensor) -> Tensor:
        """[sum T, heads, C] and [B N, heads, C] -> [B, heads, S, C]."""
        rows = image.new_zeros(self.samples, self.longest + PATCHES, *image.shape[1:])
        rows[:, self.longest :] = image.unflatten(0, (self.samples, PATCHES))
        rows[self.sample, self.slot] = text
        return rows.transpose(1, 2).contiguous()

    def image(self, rows: Tensor) -> Tensor:
        return rows[:, :, self.longest :].transpose(1, 2).flatten(0, 1)

    def text(self, rows: Tensor) -> Tensor:
        return rows.transpose(1, 2)[self.sample, self.slot]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, S], 0 where a row attends to a column: earlier rows; for patches the whole image; never padding."""
        place = torch.arange(self.longest + PATCHES, device=self.slot.device)
        row, column = place[:, None], place[None, :]
        seen = (row >= column) | (row >= self.longest)
        real = place >= self.begin[:, None]
        seen = seen & real[:, None, :] | (row == column)  # padding attends to itself, otherwise its softmax is 0 / 0
        return torch.zeros(seen.shape, dtype=dtype, device=place.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]


def attention_problem(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, wanted: Wanted) -> Problem:
    """`tokens` patches in images of 256, each preceded by a frozen text of its own length."""
    samples, scale = tokens // PATCHES, HEAD_WIDTH**-0.5
    lengths = text_lengths(samples)
    layout, normal = PrefixLayout.of(lengths, PATCHES, device), random_tensors(device, dtype)
    heads = (shape.heads, shape.groups, shape.groups)
    query, key, value = (normal(tokens, h, HEAD_WIDTH).requires_grad_() for h in heads)
    text_query, text_key, text_value = (normal(sum(lengths), h, HEAD_WIDTH) for h in heads)
    images, texts = (query, key, value), (text_query, text_key, text_value)
    gradient = normal(tokens, shape.heads, HEAD_WIDTH)
    padded = Padded(lengths, layout, device)
    candidates, skipped = [], {}

    functions: dict[str, Any] = {"eager": dense_attention, "sdpa-dense": sdpa_attention}
    if any(map(wanted, DENSE)):
        with torch.no_grad():
            leaves = [padded.pack(text, image) for text, image in zip(texts, images, strict=True)]
            mask, wide = padded.mask(dtype), padded.pack(torch.zeros_like(texts[0]), gradient)
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
        if wanted("compile"):
            functions["compile"] = compiled(dense_attention)

        def unpad(output: Tensor, gradients: list[Tensor]) -> list[Tensor]:
            return [padded.image(output), padded.text(output), *map(padded.image, gradients)]

        for provider in filter(wanted, DENSE):
            call = functools.partial(functions[provider], *leaves, mask, scale)
            candidates.append(Candidate(provider, True, call, leaves, wide, unpad))

    def packed(backend: attention.Backend) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            text = segment_attention(*texts, layout.text, layout.text, True, scale, backend)
        return prefix_attention(*images, texts[1], texts[2], layout, scale, backend), text

    for backend in filter(wanted, attention.BACKENDS):
        if reason := attention.unavailable(backend, device, dtype):
            skipped[backend] = reason
            continue
        call = functools.partial(packed, backend)
        candidates.append(
            Candidate(backend, False, call, images, gradient, lambda output, gradients: [*output, *gradients])
        )

    def exact() -> list[Tensor]:
        """16 samples at a time: the fp64 scores of all would not fit in memory."""
        found = []
        ends = [0, *layout.text.ends.tolist()[1:]]
        for first in range(0, samples, 16):
            some = lengths[first : first + 16]
            part = PrefixLayout.of(some, PATCHES, device)
            pad = Padded(some, part, device)
            rows = slice(first * PATCHES, (first + len(some)) * PATCHES)
            words = slice(ends[first], ends[first + len(some)])
            inputs = [
                pad.pack(t[words].double(), i.detach()[rows].double()).requires_grad_()
                for t, i in zip(texts, images, strict=True)
            ]
            q, k, v = inputs
            output = dense_attention(q, k, v, pad.mask(torch.float64), scale)
            upstream = pad.pack(texts[0].new_zeros(texts[0][words].shape).double(), gradient[rows].double())
            gradients = torch.autograd.grad(output, inputs, upstream)
            found.append([pad.image(output.detach()), pad.text(output.detach()), *map(pad.image, gradients)])
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    work = attention_work(lengths, shape.heads, shape.groups, gradient.element_size())
    return Problem(
        "attention",
        shape,
        tokens,
        candidates,
        skipped,
        exact,
        work,
        lambda mode: [gemm_floor(work[mode].flops, dtype, device), copy_floor(work[mode].bytes, device)],
        {"heads": shape.heads, "groups": shape.groups, "text": list(TEXT)},
    )
