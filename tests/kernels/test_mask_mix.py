"""The mixture of latents and mask token, by every provider, against the formula in fp64.

Without a GPU the kernel runs in Triton's interpreter: this checks its arithmetic, but not its speed or races.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.kernels.mask_mix import _fused, _fused_backward, mask_mix

PROVIDERS = ["reference", "triton"]
SLACK = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(samples: int, patches: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[list, torch.Tensor]:
    """Latents, mask, mask token and positions; and the gradient of the result."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    latents = normal(samples, patches, width)
    mask = torch.rand(samples, patches, generator=draw) < 0.6
    return [latents, mask, normal(1, 1, width), normal(1, patches, width)], normal(samples, patches, width)


def formula(latents, mask, mask_token, positions):
    mixed = latents.clone()
    mixed[mask] = mask_token[0, 0]
    return mixed if positions is None else mixed + positions


def by(provider: str):
    return lambda *args: mask_mix(*args, provider=provider)


def run(function, tensors: list, gradient: torch.Tensor, needed=(True, True, True)) -> list[torch.Tensor | None]:
    """The result, then the gradients of latents, mask token and positions (or None)."""
    latents, mask, token, positions = tensors
    leaves = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip((latents, token, positions), needed, strict=True)
    ]
    result = function(leaves[0], mask, *leaves[1:])
    result.backward(gradient)
    return [result.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def exactly(tensors: list, gradient: torch.Tensor) -> list[torch.Tensor | None]:
    doubles = [t if t is None or t.dtype == torch.bool else t.double() for t in tensors]
    return run(formula, doubles, gradient.double())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 72), (1, 1, 8), (9, 16, 130)], ids=str)
def test_error_is_at_most_twice_eager_pytorchs(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """FlashAttention's rule, in the same dtype against fp64. The interpreter truncates to bf16 where a GPU rounds."""
    tensors, gradient = make(*shape, dtype)
    exact = exactly(tensors, gradient)
    eager = run(by("reference"), tensors, gradient)
    fused = run(by("triton"), tensors, gradient)
    for ours, theirs, wanted in zip(fused, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == wanted.shape
        assert distance(ours, wanted) <= 2 * distance(theirs, wanted) + SLACK[dtype]


def test_fp32_parameters_with_bf16_latents() -> None:
    (latents, mask, token, positions), gradient = make(3, 16, 24, torch.float32)
    tensors, gradient = [latents.bfloat16(), mask, token, positions], gradient.bfloat16()
    exact = exactly(tensors, gradient)
    fused = run(by("triton"), tensors, gradient)
    assert [x.dtype for x in fused] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(fused[0].double(), exact[0], rtol=2**-7, atol=0)
    for ours, wanted in zip(fused[1:], exact[1:], strict=True):  # sums of bf16 gradients, never rounded to bf16
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("table", [True, False], ids=["positions", "none"])
def test_gradients_in_fp64(table: bool) -> None:
    """Numerical differentiation, through the same kernel with an fp64 accumulator."""
    (latents, mask, token, positions), _ = make(2, 3, 4, torch.float64)
    leaves = [t.requires_grad_() for t in ((latents, token, positions) if table else (latents, token))]

    def function(latents, token, positions=None):
        return mask_mix(latents, mask, token, positions, provider="triton")

    assert torch.autograd.gradcheck(function, leaves)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.sampled_from([0, 1, 3]),
    patches=st.sampled_from([0, 1, 7, 33, 65]),
    width=st.sampled_from([0, 1, 8, 72, 130]),
    table=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "samples", "transposed", "expanded"]),
    share=st.sampled_from(["random", "none", "all", "one"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_stride(samples, patches, width, table, layout, share, seed) -> None:
    (latents, mask, token, positions), gradient = make(samples, patches, width, torch.float32, seed)
    if share != "random":
        mask = torch.full_like(mask, share == "all")
        if share == "one" and mask.numel():
            mask[-1, -1] = True
    if layout == "columns":
        latents, gradient, positions = (torch.cat((x, x), dim=-1)[..., :width] for x in (latents, gradient, positions))
    elif layout == "samples":
        latents, gradient, mask = (x.repeat_interleave(2, dim=0)[::2] for x in (latents, gradient, mask))
    elif layout == "transposed":
        latents, gradient, positions = (x.mT.contiguous().mT for x in (latents, gradient, positions))
        mask = mask.T.contiguous().T
    elif layout == "expanded":  # as passed by autograd after a sum
        gradient = gradient.new_full((1, 1, 1), 0.5).expand(samples, patches, width)
    tensors = [latents, mask, token, positions if table else None]
    exact = exactly(tensors, gradient)
    for ours, wanted in zip(run(by("triton"), tensors, gradient), exact, strict=True):
        assert (ours is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=3) if any(n)], ids=str)
def test_every_combination_of_gradients(needed: tuple[bool, ...], provider: str) -> None:
    tensors, gradient = make(3, 20, 24, torch.float32)
    exact = exactly(tensors, gradient)[1:]
    found = run(by(provider), tensors, gradient, needed)[1:]
    assert tuple(x is not None for x in found) == needed
    for ours, wanted, need in zip(found, exact, needed, strict=True):
        if need:
            torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_unneeded_gradients_are_not_computed(needed: tuple[bool, ...]) -> None:
    (_, mask, *_), gradient = make(3, 20, 24, torch.float32)
    assert tuple(x.numel() > 0 for x in _fused_backward(gradient, mask, *needed)) == needed


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_masked_latents_do_not_affect_the_result(provider: str, poison: float) -> None:
    (latents, mask, token, positions), gradient = make(3, 33, 72, torch.float32)
    clean = run(by(provider), [latents, mask, token, positions], gradient)
    poisoned = latents.masked_fill(mask[..., None], poison)
    for ours, wanted in zip(run(by(provider), [poisoned, mask, token, positions], gradient), clean, strict=True):
        assert torch.equal(ours, wanted)
    assert clean[1][mask].count_nonzero() == 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_gradients_are_split_by_the_mask(provider: str) -> None:
    tensors, gradient = make(3, 33, 72, torch.float32)
    mask = tensors[1][..., None]
    latents = run(by(provider), tensors, gradient.masked_fill(mask, float("nan")))[1]
    token = run(by(provider), tensors, gradient.masked_fill(~mask, float("nan")))[2]
    assert latents.isfinite().all() and token.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_deterministic_and_samples_independent_of_their_batch(dtype: torch.dtype) -> None:
    tensors, gradient = make(5, 65, 72, dtype)
    first, again = (run(by("triton"), tensors, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    latents, mask, token, positions = tensors
    part = run(by("triton"), [latents[1:3], mask[1:3], token, positions], gradient[1:3])
    assert torch.equal(part[0], first[0][1:3]) and torch.equal(part[1], first[1][1:3])


def test_offsets_beyond_32_bits() -> None:
    """Offsets in elements, over storage of which only a few pages are touched."""
    (latents, mask, token, positions), _ = make(3, 2, 8, torch.float16)
    far = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 2, 8), (2**30, 8, 1))
    far.copy_(latents)
    assert torch.equal(_fused(far, mask, token, positions), _fused(latents, mask, token, positions))
    for x, y in zip(_fused_backward(far, mask, *[True] * 3), _fused_backward(latents, mask, *[True] * 3), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("table", [True, False], ids=["positions", "none"])
def test_opcheck(table: bool) -> None:
    (latents, mask, token, positions), gradient = make(2, 9, 16, torch.float32)
    arguments = (latents.requires_grad_(), mask, token.requires_grad_(), positions.requires_grad_() if table else None)
    assert set(torch.library.opcheck(_fused, arguments).values()) == {"SUCCESS"}
    for needed in [(True, True, True), (False, True, False)]:
        assert set(torch.library.opcheck(_fused_backward, (gradient, mask, *needed)).values()) == {"SUCCESS"}
    tensors = [None if t is None else t.detach() for t in arguments]
    compiled = torch.compile(by("triton"), fullgraph=True, backend="aot_eager")
    for ours, wanted in zip(run(compiled, tensors, gradient), run(by("triton"), tensors, gradient), strict=True):
        assert (ours is None and wanted is None) or torch.equal(ours, wanted)


def test_shapes_and_types_are_checked() -> None:
    (latents, mask, token, positions), _ = make(2, 9, 16, torch.float32)
    for wrong in [
        (latents, mask.to(torch.uint8), token, positions),
        (latents, mask[:, :8], token, positions),
        (latents, mask, token[..., :8], positions),
        (latents, mask, token, positions[:, :8]),
    ]:
        with pytest.raises(AssertionError):
            mask_mix(*wrong, provider="triton")
