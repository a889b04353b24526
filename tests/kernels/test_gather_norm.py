"""RMSNorm of selected rows, by every provider, against transformers' norm and the formula in fp64.

Without a GPU the kernel runs in Triton's interpreter: this checks its arithmetic, but not its speed or races.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.kernels.gather_norm import BLOCK_R, _fused, _fused_backward, gather_rms_norm

# After bifrost.kernels: transformers imports Triton, and the interpreter must be selected before that.
qwen = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

PROVIDERS = ["reference", "triton"]
SLACK = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EPS = 1e-6


def make(tokens: int, selected: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[list, torch.Tensor]:
    """Hidden states, rows in random order, weight; and the gradient of the result."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    size = torch.logspace(-1, 1, max(tokens, 1), dtype=torch.float64)[:tokens, None]
    rows = torch.randperm(tokens, generator=draw)[:selected]
    hidden, weight = (normal(tokens, width) * size).to(dtype), (1 + 0.3 * normal(width)).to(dtype)
    return [hidden, rows, weight], normal(selected, width).to(dtype)


def formula(hidden, rows, weight):
    x = hidden.double()[rows]
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def by(provider: str):
    return lambda *args: gather_rms_norm(*args, EPS, provider=provider)


def transformers(hidden, rows, weight):
    norm = qwen.Qwen2_5_VLRMSNorm(len(weight), EPS)
    return torch.func.functional_call(norm, {"weight": weight}, (hidden,))[rows]


def run(function, tensors: list, gradient: torch.Tensor, needed=(True, True)) -> list[torch.Tensor | None]:
    """The result, then the gradients of hidden states and weight (or None)."""
    hidden, rows, weight = tensors
    leaves = [t.detach().requires_grad_(need) for t, need in zip((hidden, weight), needed, strict=True)]
    result = function(leaves[0], rows, leaves[1])
    result.backward(gradient.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def exactly(tensors: list, gradient: torch.Tensor) -> list[torch.Tensor | None]:
    hidden, rows, weight = tensors
    return run(formula, [hidden.double(), rows, weight.double()], gradient.double())


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
@pytest.mark.parametrize("shape", [(65, 40, 72), (33, 33, 130), (7, 1, 8)], ids=str)
def test_error_is_at_most_twice_transformers(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """FlashAttention's rule, in the same dtype against fp64. The interpreter truncates to bf16 where a GPU rounds."""
    tensors, gradient = make(*shape, dtype)
    exact = exactly(tensors, gradient)
    eager = run(transformers, tensors, gradient)
    fused = run(by("triton"), tensors, gradient)
    for ours, theirs, wanted in zip(fused, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        assert distance(ours, wanted) <= 2 * distance(theirs, wanted) + SLACK[dtype]


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
def test_reference_equals_transformers_norm_of_the_rows(dtype: torch.dtype) -> None:
    tensors, gradient = make(40, 25, 72, dtype)
    ours, theirs = run(by("reference"), tensors, gradient), run(transformers, tensors, gradient)
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_fp32_weight_with_bf16_hidden_states(provider: str) -> None:
    """The result is fp32, as with transformers, and so is dWeight."""
    (hidden, rows, weight), gradient = make(40, 25, 72, torch.float32)
    tensors = [hidden.bfloat16(), rows, weight]
    ours, theirs = run(by(provider), tensors, gradient), run(transformers, tensors, gradient)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= 2**-7


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rounding_happens_before_the_weight(provider: str) -> None:
    """An fp32 weight of ones multiplies values that fp16 can hold."""
    (hidden, rows, _), _ = make(40, 25, 72, torch.float16)
    result = gather_rms_norm(hidden, rows, torch.ones(72), EPS, provider=provider)
    assert result.dtype == torch.float32 and torch.equal(result, result.half().float())


def test_gradients_in_fp64() -> None:
    """Numerical differentiation, through the same kernel with an fp64 accumulator."""
    (hidden, rows, weight), _ = make(6, 4, 5, torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: gather_rms_norm(h, rows, w, EPS, provider="triton"), leaves)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 33, 65]),
    share=st.sampled_from(["none", "one", "half", "all"]),
    width=st.sampled_from([1, 8, 72, 130]),
    layout=st.sampled_from(["plain", "columns", "rows", "transposed", "expanded"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_stride(tokens, share, width, layout, seed) -> None:
    selected = min({"none": 0, "one": 1, "half": tokens // 2, "all": tokens}[share], tokens)
    (hidden, rows, weight), gradient = make(tokens, selected, width, torch.float32, seed)
    if layout == "columns":
        hidden, gradient = (torch.cat((x, x), dim=1)[:, :width] for x in (hidden, gradient))
    elif layout == "rows":
        hidden, gradient, rows, weight = (x.repeat_interleave(2, dim=0)[::2] for x in (hidden, gradient, rows, weight))
    elif layout == "transposed":
        hidden, gradient = (x.T.contiguous().T for x in (hidden, gradient))
    elif layout == "expanded":  # as passed by autograd after a sum
        gradient = gradient.new_full((1, 1), 0.5).expand(selected, width)
    tensors = [hidden, rows, weight]
    fused = run(by("triton"), tensors, gradient)
    for ours, wanted in zip(fused, exactly(tensors, gradient), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5 if width > 1 else 1e-4)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=2) if any(n)], ids=str)
def test_every_combination_of_gradients(needed: tuple[bool, ...], provider: str) -> None:
    tensors, gradient = make(40, 25, 24, torch.float32)
    found = run(by(provider), tensors, gradient, needed)[1:]
    assert tuple(x is not None for x in found) == needed
    for ours, wanted, need in zip(found, exactly(tensors, gradient)[1:], needed, strict=True):
        if need:
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)), ids=str)
def test_unneeded_gradients_are_not_computed(needed: tuple[bool, ...]) -> None:
    (hidden, rows, weight), gradient = make(40, 25, 24, torch.float32)
    found = _fused_backward(gradient, hidden, rows, weight, EPS, *needed)
    assert tuple(x.numel() > 0 for x in found) == needed


def test_other_rows_are_not_read_and_get_no_gradient() -> None:
    (hidden, rows, weight), gradient = make(65, 30, 72, torch.float32)
    clean = run(by("triton"), [hidden, rows, weight], gradient)
    left_out = torch.ones(65, dtype=torch.bool)
    left_out[rows] = False
    poisoned = hidden.masked_fill(left_out[:, None], float("nan"))
    for ours, wanted in zip(run(by("triton"), [poisoned, rows, weight], gradient), clean, strict=True):
        assert torch.equal(ours, wanted)
    assert clean[1][left_out].count_nonzero() == 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_rows_of_zeros_with_and_without_eps(provider: str) -> None:
    """A zero row gives zero with an eps; without one it does not affect its neighbours."""
    (hidden, rows, weight), gradient = make(3 * BLOCK_R, 2 * BLOCK_R + 1, 8, torch.float32)
    result, d_hidden, _ = run(by(provider), [torch.zeros_like(hidden), rows, weight], gradient)
    assert result.count_nonzero() == 0 and d_hidden.isfinite().all()

    def without(*args):
        return gather_rms_norm(*args, 0.0, provider=provider)

    assert all(x.isfinite().all() for x in run(without, [hidden, rows, weight], gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_deterministic_and_rows_independent_of_their_batch(dtype: torch.dtype) -> None:
    (hidden, rows, weight), gradient = make(65, 40, 72, dtype)
    first, again = (run(by("triton"), [hidden, rows, weight], gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    part = run(by("triton"), [hidden, rows[9:21], weight], gradient[9:21])
    assert torch.equal(part[0], first[0][9:21])
    assert torch.equal(part[1][rows[9:21]], first[1][rows[9:21]])


def test_offsets_beyond_32_bits() -> None:
    """Offsets in elements, over storage of which only a few pages are touched."""
    (hidden, rows, weight), gradient = make(3, 3, 8, torch.float16)
    far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((3, 8), (2**30, 1))
    far.copy_(hidden)
    wanted = _fused(hidden, rows, weight, EPS), *_fused_backward(gradient, hidden, rows, weight, EPS, True, True)
    found = _fused(far, rows, weight, EPS), *_fused_backward(gradient, far, rows, weight, EPS, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_opcheck() -> None:
    (hidden, rows, weight), gradient = make(20, 9, 16, torch.float32)
    arguments = (hidden.requires_grad_(), rows, weight.requires_grad_(), EPS)
    assert set(torch.library.opcheck(_fused, arguments).values()) == {"SUCCESS"}
    tensors = [hidden.detach(), rows, weight.detach()]
    for needed in [(True, True), (False, True)]:
        checks = torch.library.opcheck(_fused_backward, (gradient, *tensors, EPS, *needed))
        assert set(checks.values()) == {"SUCCESS"}
    compiled = torch.compile(by("triton"), fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled, tensors, gradient), run(by("triton"), tensors, gradient), strict=True):
        assert torch.equal(ours, wanted)


def test_rows_are_checked_on_the_cpu() -> None:
    hidden, weight = torch.randn(4, 8), torch.ones(8)
    for wrong in [[0, 4], [-1, 2], [1, 1], [0.0, 1.0], [True, False]]:
        with pytest.raises(AssertionError):
            gather_rms_norm(hidden, torch.tensor(wrong), weight, EPS, provider="triton")
    with pytest.raises(AssertionError):
        gather_rms_norm(hidden, torch.tensor([0]), weight[:4], EPS, provider="triton")
