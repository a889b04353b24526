"""The head and its loss, by every provider, against the formula written out in fp64.

The kernel runs in Triton's interpreter here: its arithmetic is checked, its speed and races are not.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bifrost.kernels import PatchLatentHead, patch_latent_loss
from bifrost.kernels.latent_loss import _fused

PROVIDERS = ["reference", "triton"]


def make(tokens: int, width: int, latents: int, dtype: torch.dtype, seed: int = 0, residual: float = 1.0) -> list:
    """hidden, weight, bias, target, token weights; `residual` is the size of the residual beside the target's."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    hidden, weight, bias = normal(tokens, width), normal(latents, width) * width**-0.5, normal(latents)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    exact = hidden.double() @ weight.double().T + bias.double()
    target = (exact + residual * normal(tokens, latents)).to(dtype)
    return [hidden, weight, bias, target, torch.rand(tokens, generator=draw, dtype=torch.float64).to(dtype)]


def formula(hidden, weight, bias, target, token_weight, normalizer):
    error = hidden.double() @ weight.double().T - target.double()
    error = error if bias is None else error + bias.double()
    return (error.square().mean(-1) * token_weight.double()).sum() / normalizer


def gradients(function, tensors: list, normalizer: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of every tensor (None stays None)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves, normalizer)
    loss.backward()
    return loss.detach().double(), [leaf.grad.double() for leaf in leaves if leaf is not None]


def by(provider: str):
    return lambda *args: patch_latent_loss(*args, provider=provider)[0]


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(130, 72, 72), (64, 64, 64), (1, 24, 40), (65, 8, 200)], ids=str)
def test_error_is_at_most_twice_eager_pytorchs(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """FlashAttention's rule, in the same dtype against fp64. The interpreter truncates to bf16 where a GPU rounds."""
    tensors = make(*shape, dtype)
    loss, exact = gradients(formula, tensors, 7.0)
    eager_loss, eager = gradients(by("reference"), tensors, 7.0)
    fused_loss, fused = gradients(by("triton"), tensors, 7.0)
    assert abs(fused_loss - loss) <= 2 * abs(eager_loss - loss) + 1e-6 * abs(loss)
    slack = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for ours, theirs in zip(distance(fused, exact), distance(eager, exact), strict=True):
        assert ours <= 2 * theirs + slack


def test_gradients_in_fp64() -> None:
    """Numerical differentiation, through the same kernel with an fp64 accumulator."""
    tensors = [t.requires_grad_() for t in make(5, 8, 12, torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: patch_latent_loss(*args, 3.0, provider="triton")[0], tensors)


def test_the_residual_is_not_rounded_with_the_prediction() -> None:
    """The accuracy claim: at residual / target = 0.1, bf16, the error of dPrediction is at most 0.75 of eager's."""
    hidden, weight, bias, target, _ = make(256, 128, 128, torch.bfloat16, residual=0.1)
    ones = torch.ones(256)
    exact = hidden.double() @ weight.double().T + bias.double() - target.double()
    _, _, fused = _fused(hidden, weight, bias, target, ones, True)
    eager = torch.nn.functional.linear(hidden, weight, bias).float() - target.float()
    ours, theirs = distance([fused.double(), eager.double()], [exact, exact])
    assert ours <= 0.75 * theirs


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 63, 64, 65, 130]),
    width=st.sampled_from([8, 24, 72, 130]),
    latents=st.sampled_from([8, 40, 65]),
    with_bias=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "rows", "transposed"]),
    weights=st.sampled_from(["random", "zero", "one"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_stride(tokens, width, latents, with_bias, layout, weights, seed) -> None:
    hidden, weight, bias, target, token_weight = make(tokens, width, latents, torch.float32, seed)
    token_weight = {"random": token_weight, "zero": torch.zeros(tokens), "one": torch.ones(tokens)}[weights]
    if layout == "columns":
        hidden = torch.cat((hidden, hidden), dim=1)[:, :width]
        target = torch.cat((target, target), dim=1)[:, :latents]
    elif layout == "rows":
        hidden = hidden.repeat_interleave(2, dim=0)[::2]
    elif layout == "transposed":
        weight = weight.T.contiguous().T
    tensors = [hidden, weight, bias if with_bias else None, target, token_weight]
    loss, exact = gradients(formula, tensors, 3.0)
    fused_loss, fused = gradients(by("triton"), tensors, 3.0)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(fused, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=5) if any(n)], ids=str)
def test_every_combination_of_gradients(needed: tuple[bool, ...]) -> None:
    tensors = make(20, 16, 24, torch.float32)
    wanted = gradients(formula, tensors, 3.0)[1]
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    patch_latent_loss(*leaves, 3.0, provider="triton")[0].backward()
    for leaf, need, exact in zip(leaves, needed, wanted, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias, target, token_weight = make(20, 16, 24, torch.float32)
    with torch.no_grad():
        loss, squares = patch_latent_loss(hidden, weight, bias, target, token_weight, 3.0, provider="triton")
    torch.testing.assert_close(loss.double(), formula(hidden, weight, bias, target, token_weight, 3.0))
    assert squares.shape == (20,)
    assert _fused(hidden, weight, bias, target, token_weight, False)[2].numel() == 0


def test_repeats_to_the_bit_and_rows_do_not_know_their_batch() -> None:
    tensors = make(130, 72, 72, torch.bfloat16)
    first, again = gradients(by("triton"), tensors, 7.0), gradients(by("triton"), tensors, 7.0)
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    hidden, weight, bias, target, token_weight = tensors
    whole = _fused(hidden, weight, bias, target, token_weight, True)[1]
    part = _fused(hidden[64:128], weight, bias, target[64:128], token_weight[64:128], True)[1]
    assert torch.equal(whole[64:128], part)


def test_registered_as_torch_wants_it() -> None:
    hidden, weight, bias, target, token_weight = make(9, 16, 24, torch.float32)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), bias, target, token_weight, True)
    assert set(torch.library.opcheck(_fused, arguments).values()) == {"SUCCESS"}
    compiled = torch.compile(by("triton"), fullgraph=True, backend="aot_eager")
    wanted = by("triton")(hidden, weight, bias, target, token_weight, 3.0)
    assert torch.equal(compiled(hidden, weight, bias, target, token_weight, 3.0), wanted)


def test_autocast_uses_its_dtype_and_keeps_fp32_gradients() -> None:
    tensors = make(20, 16, 16, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = patch_latent_loss(*leaves, *tensors[3:], 3.0, provider="triton")
    loss.backward()
    assert loss.dtype == torch.float32
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    bf16 = [t.bfloat16() for t in tensors[:3]]
    torch.testing.assert_close(loss, patch_latent_loss(*bf16, *tensors[3:], 3.0, provider="triton")[0])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_gives_predictions_or_the_loss(provider: str) -> None:
    head = PatchLatentHead(24, provider)
    hidden, target = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    prediction = head(hidden)
    assert prediction.shape == hidden.shape
    loss, squares = head(hidden, target, None, 10.0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, target))
    assert not squares.requires_grad


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_loss_is_fp32_whatever_comes_in(provider: str) -> None:
    hidden, weight, bias, target, _ = make(37, 24, 24, torch.bfloat16)
    loss, squares = patch_latent_loss(hidden, weight, bias, target, torch.ones(37), 37.0, provider=provider)
    assert loss.dtype == squares.dtype == torch.float32
