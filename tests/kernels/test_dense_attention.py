"""Short attention in 16 bits on a CPU, against dense attention in fp64 and torch's own in the same type."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bifrost.kernels import Segments, dense_attention, dense_is_faster, segment_attention
from bifrost.kernels.dense_attention import MOST_KEYS

SCALE = 0.2
CPU = torch.device("cpu")


def rows(count: int, heads: int, seed: int) -> Tensor:
    return torch.randn(count, heads, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """One sample [R, H, C] over [K, G, C]."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhc,khc->hqk", query, key) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), value)


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (1, 9, 40, 3)], ids=["equal", "ragged"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_segments(lengths: tuple[int, ...], heads: tuple[int, int], causal: bool) -> None:
    """Output and gradients of each segment to the rounding of bf16; equal queries over ragged keys as well."""
    counts = lengths if causal else (5,) * len(lengths)
    inputs = [rows(sum(counts), heads[0], 0), *(rows(sum(lengths), heads[1], seed) for seed in (1, 2))]
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = segment_attention(*leaves, Segments.of(counts), Segments.of(lengths), causal, SCALE)
    gradient = rows(sum(counts), heads[0], 3)
    found = torch.autograd.grad(out, leaves, gradient)
    doubles = [x.double().requires_grad_() for x in inputs]
    parts = zip(doubles[0].split(counts), doubles[1].split(lengths), doubles[2].split(lengths), strict=True)
    wanted = torch.cat([exact(*part, causal) for part in parts])
    assert error(out, wanted) < 4e-3
    for ours, theirs in zip(found, torch.autograd.grad(wanted, doubles, gradient.double()), strict=True):
        assert error(ours, theirs) < 6e-3


def test_is_as_exact_as_torchs_flash_attention() -> None:
    """With scores of standard deviation 4, which 16 bits do not hold."""
    query, key, value, gradient = (4 ** (seed < 2) * rows(8 * 112, 3, seed).unflatten(0, (8, 112)) for seed in range(4))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    doubles = [x.double().requires_grad_() for x in (query, key, value)]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*inputs, scale=SCALE / 4).transpose(1, 2)

    exact = torchs(*doubles)
    wanted = [exact.detach(), *torch.autograd.grad(exact, doubles, gradient.double())]
    errors = []
    for attend in (lambda *x: dense_attention(*x, SCALE / 4), torchs):
        out = attend(*leaves)
        found = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
        errors.append([error(a, b) for a, b in zip(found, wanted, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.5 * theirs


def test_a_sample_with_nan_leaves_the_others_alone() -> None:
    lengths = (4, 9)
    query, key, value = (rows(13, 2, seed) for seed in range(3))
    clean = segment_attention(query, key, value, *(Segments.of(lengths),) * 2, True, SCALE)
    key[0] = torch.nan
    found = segment_attention(query, key, value, *(Segments.of(lengths),) * 2, True, SCALE)
    assert found[:4].isnan().all() and torch.equal(found[4:], clean[4:])


def test_only_where_it_is_faster() -> None:
    assert dense_is_faster(MOST_KEYS, CPU, torch.bfloat16)
    assert not dense_is_faster(MOST_KEYS + 1, CPU, torch.bfloat16)
    assert not dense_is_faster(8, CPU, torch.float32)
    assert not dense_is_faster(8, torch.device("cuda"), torch.bfloat16)
