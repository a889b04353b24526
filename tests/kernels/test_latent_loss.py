"""The head and its loss, by every provider, against the formula in fp64.

The kernels run in Triton's interpreter here: this checks their arithmetic, but not their speed or races.
"""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bifrost.kernels import PatchLatentHead, latent_loss, patch_latent_loss
from bifrost.kernels.latent_loss import PROVIDERS, _fused, unavailable

FUSED = PROVIDERS[1:]
EPILOGUE = [provider for provider in FUSED if provider != "in-place"]
"""Providers that subtract the target from the fp32 accumulator."""
fused = pytest.mark.parametrize("provider", FUSED)


def make(tokens: int, width: int, latents: int, dtype: torch.dtype, seed: int = 0, residual: float = 1.0) -> list:
    """hidden, weight, bias, target, token weights; `residual` is its size relative to the target."""
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


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(130, 72, 72), (64, 64, 64), (1, 24, 40), (65, 8, 200)], ids=str)
def test_error_is_at_most_twice_eager_pytorchs(provider, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """FlashAttention's rule, in the same dtype against fp64."""
    tensors = make(*shape, dtype)
    loss, exact = gradients(formula, tensors, 7.0)
    eager_loss, eager = gradients(by("reference"), tensors, 7.0)
    our_loss, ours = gradients(by(provider), tensors, 7.0)
    assert abs(our_loss - loss) <= 2 * abs(eager_loss - loss) + 1e-6 * abs(loss)
    slack = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    for error, theirs in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert error <= 2 * theirs + slack


@fused
def test_small_gradients_survive_fp16(provider) -> None:
    """2 / (normalizer D) times a weight is below fp16's smallest normal number, but the gradients are not."""
    tensors = make(130, 72, 72, torch.float16)
    exact, eager, ours = (gradients(f, tensors, 1000.0)[1] for f in (formula, by("reference"), by(provider)))
    for error, theirs in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert error <= 2 * theirs + 2**-12


@fused
def test_gradients_in_fp64(provider) -> None:
    """Numerical differentiation, through the same kernel with an fp64 accumulator."""
    tensors = [t.requires_grad_() for t in make(5, 6, 4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: patch_latent_loss(*args, 3.0, provider=provider)[0], tensors)


@pytest.mark.parametrize("provider", EPILOGUE)
def test_residual_is_not_rounded_with_the_prediction(provider) -> None:
    """At residual / target = 0.1 in bf16, the error of dPrediction is at most 0.75 of eager's."""
    hidden, weight, bias, target, _ = make(256, 128, 128, torch.bfloat16, residual=0.1)
    ones = torch.ones(256)
    exact = hidden.double() @ weight.double().T + bias.double() - target.double()
    _, _, ours, _ = _fused(hidden, weight, bias, target, ones, provider, True, False)
    eager = torch.nn.functional.linear(hidden, weight, bias).float() - target.float()
    error, theirs = distance([ours.double(), eager.double()], [exact, exact])
    assert error <= 0.75 * theirs


@pytest.mark.parametrize("provider", EPILOGUE)
def test_gradients_are_not_rounded_with_the_prediction(provider) -> None:
    """The same for dHidden, dWeight and dBias of the public function."""
    tensors = make(256, 128, 128, torch.bfloat16, residual=0.1)
    exact = gradients(formula, tensors, 256.0)[1][:3]
    eager = gradients(by("reference"), tensors, 256.0)[1][:3]
    ours = gradients(by(provider), tensors, 256.0)[1][:3]
    for error, theirs in zip(distance(ours, exact), distance(eager, exact), strict=True):
        assert error <= 0.75 * theirs


@fused
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 7, 63, 64, 65, 130]),
    width=st.sampled_from([8, 24, 72, 130]),
    latents=st.sampled_from([8, 40, 65]),
    with_bias=st.booleans(),
    layout=st.sampled_from(["plain", "columns", "rows", "transposed", "unaligned"]),
    weights=st.sampled_from(["random", "zero", "one"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_stride(provider, tokens, width, latents, with_bias, layout, weights, seed) -> None:
    hidden, weight, bias, target, token_weight = make(tokens, width, latents, torch.float32, seed)
    token_weight = {"random": token_weight, "zero": torch.zeros(tokens), "one": torch.ones(tokens)}[weights]
    if layout == "columns":
        hidden = torch.cat((hidden, hidden), dim=1)[:, :width]
        target = torch.cat((target, target), dim=1)[:, :latents]
    elif layout == "rows":
        hidden = hidden.repeat_interleave(2, dim=0)[::2]
    elif layout == "transposed":
        weight = weight.T.contiguous().T
    elif layout == "unaligned":
        hidden = torch.cat((hidden[:, :1], hidden), dim=1)[:, 1:]
    tensors = [hidden, weight, bias if with_bias else None, target, token_weight]
    loss, exact = gradients(formula, tensors, 3.0)
    our_loss, ours = gradients(by(provider), tensors, 3.0)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    for gradient, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-5)


@fused
@pytest.mark.parametrize("needed", [n for n in itertools.product([False, True], repeat=5) if any(n)], ids=str)
def test_every_combination_of_gradients(provider, needed: tuple[bool, ...]) -> None:
    tensors = make(20, 16, 24, torch.float32)
    wanted = gradients(formula, tensors, 3.0)[1]
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    patch_latent_loss(*leaves, 3.0, provider=provider)[0].backward()
    for leaf, need, exact in zip(leaves, needed, wanted, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-4, atol=1e-5)


@fused
def test_only_tensors_needed_for_backward_are_saved(provider, monkeypatch) -> None:
    """The residual for hidden, weight or target; its column sums for the bias; neither in evaluation."""
    asked = []

    def spy(*args):
        asked.append(args[-2:])
        return _fused(*args)

    monkeypatch.setattr(latent_loss, "_fused", spy)
    tensors = make(20, 16, 24, torch.float32)
    loss = formula(*tensors, 3.0)
    for needed in ((), (0,), (1,), (3,), (2,), (4,), (1, 2)):
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        torch.testing.assert_close(by(provider)(*leaves, 3.0).double(), loss)
        assert asked.pop() == (bool({0, 1, 3} & set(needed)), 2 in needed)
    with torch.no_grad():
        torch.testing.assert_close(by(provider)(*leaves, 3.0).double(), loss)
    assert asked.pop() == (False, False)
    for keep, sum_columns in itertools.product([False, True], repeat=2):
        _, squares, d, columns = _fused(*tensors, provider, keep, sum_columns)
        assert (squares.shape, d.numel(), columns.numel()) == ((20,), keep * 20 * 24, sum_columns * 24)


@fused
def test_bitwise_deterministic_and_rows_independent_of_their_batch(provider) -> None:
    tensors = make(130, 72, 72, torch.bfloat16)
    first, again = gradients(by(provider), tensors, 7.0), gradients(by(provider), tensors, 7.0)
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    hidden, weight, bias, target, token_weight = tensors
    whole = _fused(hidden, weight, bias, target, token_weight, provider, True, False)[1]
    part = _fused(hidden[64:128], weight, bias, target[64:128], token_weight[64:128], provider, True, False)[1]
    if provider == "in-place":  # the library's GEMM may use another order for another shape
        torch.testing.assert_close(whole[64:128], part, rtol=1e-4, atol=0)
    else:
        assert torch.equal(whole[64:128], part)


@fused
def test_backward_allocates_no_gradient_for_unused_outputs(provider) -> None:
    """By default autograd would allocate zeros [T, D] for the residual."""
    tokens, width, latents = 12, 16, 24
    tensors = make(tokens, width, latents, torch.float32)
    loss = by(provider)(*(t.requires_grad_() for t in tensors), 3.0)
    filled: list[tuple[int, ...]] = []

    class Filled(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
            result = operator(*arguments, **(settings or {}))
            if "zero" in str(operator):
                filled.append(tuple(result.shape))
            return result

    with Filled():
        loss.backward()
        torch.zeros(1)
    assert filled == [(1,)]


@fused
def test_opcheck(provider) -> None:
    hidden, weight, bias, target, token_weight = make(9, 16, 24, torch.float32)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target, token_weight)
    for keep, sum_columns in ((True, True), (True, False), (False, True)):
        arguments = [t if t is not bias or sum_columns else bias.detach() for t in leaves]
        arguments = arguments if keep else [t if t is bias else t.detach() for t in arguments]
        passed = torch.library.opcheck(_fused, (*arguments, provider, keep, sum_columns))
        assert set(passed.values()) == {"SUCCESS"}
    compiled = torch.compile(by(provider), fullgraph=True, backend="aot_eager")
    wanted, found = gradients(by(provider), list(leaves), 3.0), gradients(compiled, list(leaves), 3.0)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


@fused
def test_autocast_uses_its_dtype_and_keeps_fp32_gradients(provider) -> None:
    tensors = make(20, 16, 16, torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = patch_latent_loss(*leaves, *tensors[3:], 3.0, provider=provider)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    bf16 = [t.bfloat16() for t in tensors[:3]]
    torch.testing.assert_close(loss, patch_latent_loss(*bf16, *tensors[3:], 3.0, provider=provider)[0])


@pytest.mark.parametrize("provider", ["triton-tma", "triton-tma-pair", "triton-ws"])
def test_fallback_to_pointers_is_logged_once(provider, caplog) -> None:
    """Descriptors need 16-byte alignment, which bf16 rows of 12 elements or a start at the second element lack."""
    latent_loss._warn_once.cache_clear()
    narrow = make(20, 12, 16, torch.bfloat16)
    shifted = make(20, 16, 16, torch.bfloat16)
    shifted[0] = torch.cat((shifted[0].flatten()[:1], shifted[0].flatten()))[1:].view(20, 16)
    with caplog.at_level(logging.WARNING):
        few = make(20, 16, 12, torch.bfloat16)  # latents, whose residual is stored in rows of 24 bytes
        few[3] = few[3].float()  # in rows of 48
        apart = make(20, 16, 16, torch.bfloat16)
        apart[3] = torch.cat((apart[3], apart[3][:, :4]), dim=1)[:, :16]  # target, in rows of 40 bytes
        for tensors in (narrow, shifted, few, apart, narrow):
            assert torch.equal(by(provider)(*tensors, 3.0), by("triton")(*tensors, 3.0))
    assert len(caplog.messages) == 4
    assert all(message.startswith(f"{provider} falls back to triton: ") for message in caplog.messages)
    assert "rows of 12 elements of torch.bfloat16" in caplog.messages[2]
    assert "row stride of 20 elements" in caplog.messages[3]


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("provider", "capability", "dtype", "triton", "why"),
    [
        ("reference", (7, 0), FP64, "3.9.0", None),
        ("triton", (8, 0), BF16, "3.6.0", None),
        ("triton", (12, 0), FP32, "3.9.0", None),
        ("in-place", (7, 5), BF16, "3.9.0", "in-place needs compute capability 8.0, this GPU has 7.5"),
        ("triton", (9, 0), FP64, "3.9.0", "fp32, not in torch.float64"),
        ("triton-tma", (9, 0), BF16, "3.6.0", None),
        ("triton-tma", (9, 0), FP32, "3.9.0", "bf16 and fp16"),
        ("triton-tma-pair", (9, 0), BF16, "3.6.0", None),
        ("triton-tma-pair", (9, 0), FP32, "3.9.0", "bf16 and fp16"),
        ("triton-tma", (8, 9), BF16, "3.9.0", "9.0 or 10.x, this GPU has 8.9"),
        ("triton-tma", (12, 0), BF16, "3.9.0", "9.0 or 10.x, this GPU has 12.0"),
        ("triton-ws", (10, 3), BF16, "3.10.1", None),
        ("triton-ws", (9, 0), BF16, "3.6.0", "needs Triton 3.7"),
    ],
)
def test_requirements_of_each_provider(provider, capability, dtype, triton, why, monkeypatch) -> None:
    monkeypatch.setattr(latent_loss, "INTERPRETED", False)
    monkeypatch.setattr(latent_loss.triton, "__version__", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = unavailable(provider, torch.device("cuda"), dtype)
    assert reason is None if why is None else why in reason and "\n" not in reason


@fused
def test_all_providers_run_interpreted(provider) -> None:
    assert all(unavailable(provider, torch.device("cpu"), dtype) is None for dtype in (BF16, FP32, FP64))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_head_returns_predictions_or_the_loss(provider: str) -> None:
    head = PatchLatentHead(24, provider)
    hidden, target = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    prediction = head(hidden)
    assert prediction.shape == hidden.shape
    loss, squares = head(hidden, target, None, 10.0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, target))
    assert not squares.requires_grad


@pytest.mark.parametrize("provider", PROVIDERS)
def test_loss_is_fp32_for_any_input(provider: str) -> None:
    hidden, weight, bias, target, _ = make(37, 24, 24, torch.bfloat16)
    loss, squares = patch_latent_loss(hidden, weight, bias, target, torch.ones(37), 37.0, provider=provider)
    assert loss.dtype == squares.dtype == torch.float32
