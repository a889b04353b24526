"""The two packed calls against dense attention with the public release's hybrid mask, in fp64."""

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bifrost.kernels import PrefixLayout, Segments, attention, prefix_attention, segment_attention
from bifrost.kernels.attention import BACKENDS, unavailable

SCALE = 0.3


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hybrid(query: Tensor, key: Tensor, value: Tensor, text: int) -> Tensor:
    """One sample, [T + N, H, C], with explicit scores and mask: text is causal, images attend to everything."""
    rows, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhc,khc->hqk", query, key) * SCALE
    row = torch.arange(rows)
    seen = (row[None, :] <= row[:, None]) | (row[:, None] >= text)
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def packed(samples: list[list[Tensor]], lengths: list[int], patches: int, backend: str) -> list[Tensor]:
    """The two calls for all samples (query, key, value of each); results per sample, text before image."""
    layout = PrefixLayout.of(lengths, patches)
    cut = list(zip(samples, lengths, strict=True))
    text = [torch.cat([sample[i][:length] for sample, length in cut]) for i in range(3)]
    image = [torch.cat([sample[i][length:] for sample, length in cut]) for i in range(3)]
    over_text = segment_attention(*text, layout.text, layout.text, True, SCALE, backend)
    over_both = prefix_attention(*image, text[1], text[2], layout, SCALE, backend)
    parts = zip(over_text.split(lengths), over_both.split(patches), strict=True)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    patches=st.sampled_from([1, 4, 9]),
    heads=st.sampled_from([(1, 1), (6, 1), (6, 2), (4, 4), (14, 2)]),
    seed=st.integers(0, 1000),
)
def test_two_packed_calls_equal_the_hybrid_mask(backend, lengths, patches, heads, seed) -> None:
    """Forward and gradients of query, key and value within 1e-12: ragged texts, one token, grouped queries."""
    query_heads, key_heads = heads
    samples = [
        [
            draw(length + patches, count, 8, seed=seed + 10 * i + j).requires_grad_()
            for j, count in enumerate((query_heads, key_heads, key_heads))
        ]
        for i, length in enumerate(lengths)
    ]
    found = packed(samples, lengths, patches, backend)
    wanted = [hybrid(*sample, length) for sample, length in zip(samples, lengths, strict=True)]
    weights = [draw(*out.shape, seed=seed + 7) for out in wanted]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    leaves = [tensor for sample in samples for tensor in sample]
    ours = torch.autograd.grad(sum((o * w).sum() for o, w in zip(found, weights, strict=True)), leaves)
    theirs = torch.autograd.grad(sum((o * w).sum() for o, w in zip(wanted, weights, strict=True)), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_left_padding_is_removed(backend: str) -> None:
    """Padded rows, as from a tokenizer: with a padding mask, and packed without one."""
    lengths, longest, patches = [3, 1, 5], 5, 4
    query, key, value = (draw(3, longest + patches, heads, 8, seed=i) for i, heads in enumerate((6, 2, 2)))
    wanted, real = [], []
    for i, length in enumerate(lengths):
        real.append([tensor[i, longest - length :] for tensor in (query, key, value)])
        k, v = (x[i].repeat_interleave(3, dim=1) for x in (key, value))
        scores = torch.einsum("qhc,khc->hqk", query[i], k) * SCALE
        row = torch.arange(longest + patches)
        seen = ((row[None, :] <= row[:, None]) | (row[:, None] >= longest)) & (row[None, :] >= longest - length)
        dense = torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, -1e30).softmax(-1), v)
        wanted.append(dense[longest - length :])
    for a, b in zip(packed(real, lengths, patches, backend), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_layout() -> None:
    layout = PrefixLayout.of([2, 1], 3)
    assert layout.text_rows.tolist() == [[0, 1, 5]]
    assert layout.image_rows.tolist() == [2, 3, 4, 6, 7, 8]
    assert layout.positions.tolist() == [0, 1, 0]
    assert layout.both.lengths == (5, 4)
    assert layout.both.ends.tolist() == [0, 5, 9]
    assert layout.both.ends.dtype == torch.int32
    layout = PrefixLayout.of([2, 1], 3, images=2)
    assert layout.text_rows.tolist() == [[0, 1, 10], [5, 6, 14]]
    assert layout.image_rows.tolist() == [2, 3, 4, 7, 8, 9, 11, 12, 13, 15, 16, 17]
    assert (layout.positions.tolist(), layout.text.lengths) == ([0, 1, 0], (2, 1))
    assert (layout.image.lengths, layout.both.lengths) == ((3, 3, 3, 3), (5, 5, 4, 4))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_images_of_a_sample_share_its_text(backend: str) -> None:
    """Output and gradients equal those with a copy of the text for each image."""
    lengths, patches, images = [3, 1, 5], 4, 3
    rows = len(lengths) * images * patches
    query, key, value = (draw(rows, heads, 8, seed=i).requires_grad_() for i, heads in enumerate((6, 2, 2)))
    text = [draw(9, 2, 8, seed=7 + i).requires_grad_() for i in range(2)]
    out = prefix_attention(query, key, value, *text, PrefixLayout.of(lengths, patches, images=images), SCALE, backend)
    copies = [torch.cat([part for part in x.split(lengths) for _ in range(images)]) for x in text]
    apart = PrefixLayout.of([length for length in lengths for _ in range(images)], patches)
    wanted = prefix_attention(query, key, value, *copies, apart, SCALE, backend)
    assert torch.equal(out, wanted)
    leaves, weight = [query, key, value, *text], draw(*out.shape, seed=9)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are computed exactly for the real rows, with texts of very different lengths."""
    computed = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, **rest):
        computed.append(query.shape[0] * query.shape[2] * key.shape[2])
        return original(query, key, value, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    lengths = [100, 1, 7]
    samples = [[draw(length + 4, 2, 8, seed=i) for i in range(3)] for length in lengths]
    packed(samples, lengths, 4, "sdpa")
    assert sum(computed) == sum(length**2 + 4 * (length + 4) for length in lengths)


def test_empty_batch() -> None:
    empty, none = torch.empty(0, 2, 8), Segments.of([])
    assert segment_attention(empty, empty, empty, none, none, True, SCALE).shape == (0, 2, 8)


@pytest.mark.parametrize("backend", ["varlen", "flash-attn-3"])
def test_library_attention_compiles_to_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call has imported the library, which is replaced by plain sums."""

    def library(query, key, value, *rest, enable_gqa=False, **settings):
        groups = query.shape[1] // key.shape[1]
        return query * (key.sum(0) + value.sum(0)).repeat_interleave(groups, dim=0)

    module = ModuleType("stand_in")
    module.__dict__["library"] = library
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(attention._SOURCES, backend, ("stand_in", "library"))
    monkeypatch.setattr(attention, "_varlen_function", lru_cache(attention._varlen_function.__wrapped__))
    monkeypatch.setattr(attention, "_RUN", dict(attention._RUN))
    tensors = [draw(rows, heads, 8) for rows, heads in ((8, 4), (8, 2), (8, 2), (5, 2), (5, 2))]
    layout = PrefixLayout.of([3, 2], 4)
    wanted = prefix_attention(*tensors, layout, SCALE, backend)
    torch._dynamo.reset()
    found = torch._dynamo.explain(prefix_attention)(*tensors, layout, SCALE, backend)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch.testing.assert_close(
        torch.compile(prefix_attention, backend="eager")(*tensors, layout, SCALE, backend), wanted
    )


def test_unavailable_backends_have_a_reason() -> None:
    cpu = torch.device("cpu")
    for backend in BACKENDS:
        reason = unavailable(backend, cpu, torch.bfloat16)
        assert (reason is None) == (backend in ("sdpa", "reference"))
        assert reason is None or ("CUDA" in reason and "\n" not in reason)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stand_in(monkeypatch: pytest.MonkeyPatch, backend: str, library: Callable) -> None:
    """Replace the package's function by `library`."""
    module = ModuleType("stand_in")
    module.library = library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(attention._SOURCES, backend, ("stand_in", "library"))
    monkeypatch.setattr(attention, "_varlen_function", lru_cache(attention._varlen_function.__wrapped__))
    monkeypatch.setattr(attention, "_RUN", dict(attention._RUN))


@pytest.mark.parametrize("backend", ["flash-attn-2", "flash-attn-3", "flash-attn-4"])
def test_deterministic_backward_is_requested_from_a_package(backend, monkeypatch, request) -> None:
    asked = []

    def library(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **rest):
        raise AssertionError("a signature without the argument")

    def newer(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic=False
    ):
        asked.append(deterministic)
        return q

    segments = Segments.of([2, 3])
    rows = draw(5, 1, 8)
    stand_in(monkeypatch, backend, newer)
    segment_attention(rows, rows, rows, segments, segments, False, SCALE, backend)
    request.getfixturevalue("deterministic")
    segment_attention(rows, rows, rows, segments, segments, False, SCALE, backend)
    assert asked == [False, True]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert unavailable(backend, gpu, torch.bfloat16) is None
    stand_in(monkeypatch, backend, library)
    assert "cannot be made deterministic" in str(unavailable(backend, gpu, torch.bfloat16))
    torch.use_deterministic_algorithms(False)
    assert unavailable(backend, gpu, torch.bfloat16) is None
