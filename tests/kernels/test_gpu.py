"""Compiled kernels on a CUDA device, for what the interpreter cannot check. Needs only torch, triton and pytest."""

import pytest
import torch

from bifrost.kernels import patch_latent_loss
from bifrost.kernels.latent_loss import PROVIDERS, _fused, unavailable
from bifrost.kernels.providers import LOSS_CANDIDATES, choose_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
each = pytest.mark.parametrize("provider", PROVIDERS[1:])


def device(provider: str, dtype: torch.dtype) -> torch.device:
    """The GPU, if it meets the provider's requirements."""
    found = torch.device("cuda", torch.cuda.current_device())
    reason = unavailable(provider, found, dtype)
    if reason is not None:
        pytest.skip(reason)
    return found


def make(tokens: int, width: int, dtype: torch.dtype, on: torch.device, residual: float = 1.0) -> list[torch.Tensor]:
    """hidden, weight, bias, target, token weights (some zero); `residual` is its size relative to the target."""
    draw = torch.Generator(on).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=on)

    hidden, weight, bias = normal(tokens, width), normal(width, width) * width**-0.5, normal(width)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    target = (exact + residual * normal(tokens, width)).to(dtype)
    token_weight = normal(tokens).abs()
    token_weight[1::7] = 0
    return [hidden, weight, bias, target, token_weight]


def formula(hidden, weight, bias, target, token_weight, normalizer):
    error = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()) - target.double()
    return (error.square().mean(-1) * token_weight.double()).sum() / normalizer


def by(provider: str):
    return lambda *arguments: patch_latent_loss(*arguments, provider=provider)[0]


def gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss, then the gradient of every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves, 7.0)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(4097, 2056), (4097, 2048), (1, 2048), (130, 72)])
def test_error_is_at_most_twice_eager_pytorchs(provider, dtype, tokens, width) -> None:
    tensors = make(tokens, width, dtype, device(provider, dtype))
    exact, eager, ours = (gradients(f, tensors) for f in (formula, by("reference"), by(provider)))
    slack = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 1e-6}[dtype]
    for found, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert distance(found, wanted) <= 2 * distance(theirs, wanted) + slack


@each
def test_gradient_near_the_target_is_more_accurate_than_eagers(provider) -> None:
    if provider == "in-place":
        pytest.skip("it begins with eager's rounded prediction")
    tensors = make(4097, 2048, torch.bfloat16, device(provider, torch.bfloat16), residual=0.1)
    exact, eager, ours = (gradients(f, tensors)[1:4] for f in (formula, by("reference"), by(provider)))
    for found, theirs, wanted in zip(ours, eager, exact, strict=True):
        assert distance(found, wanted) <= 0.75 * distance(theirs, wanted)


@each
@pytest.mark.parametrize("width", [2048, 2056])
def test_twenty_runs_are_bitwise_equal(provider, width) -> None:
    """A race or a missing barrier would eventually change a bit."""
    tensors = make(4097, width, torch.bfloat16, device(provider, torch.bfloat16))
    first = gradients(by(provider), tensors)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(gradients(by(provider), tensors), first, strict=True))


@each
def test_offsets_beyond_32_bits(provider) -> None:
    """T * D > 2^31: the last rows, checked against the same rows alone."""
    on, width = device(provider, torch.bfloat16), 2048
    tokens = 2**31 // width + 300
    if torch.cuda.mem_get_info(on)[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    draw = torch.Generator(on).manual_seed(0)
    hidden = torch.randn((tokens, width), generator=draw, device=on, dtype=torch.bfloat16)
    target = torch.randn((tokens, width), generator=draw, device=on, dtype=torch.bfloat16)
    weight = torch.randn((width, width), generator=draw, device=on, dtype=torch.bfloat16) * width**-0.5
    ones = torch.ones(tokens, device=on)
    _, squares, d, columns = _fused(hidden, weight, None, target, ones, provider, True, True)
    assert torch.isfinite(columns).all()
    for rows in (slice(0, 256), slice(tokens - 256, tokens)):
        exact = hidden[rows].double() @ weight.double().T - target[rows].double()
        assert distance(squares[rows], exact.square().mean(-1)) < 1e-2
        assert distance(d[rows], exact) < 1e-2
    assert distance(columns, d.sum(dim=0, dtype=torch.float32)) < 1e-2


@each
def test_compiles_to_one_graph(provider) -> None:
    tensors = make(513, 256, torch.bfloat16, device(provider, torch.bfloat16))
    compiled = torch.compile(by(provider), fullgraph=True)
    for found, wanted in zip(gradients(compiled, tensors), gradients(by(provider), tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-5)


@each
def test_allocator_of_the_program_is_kept(provider) -> None:
    """Descriptors created on the device use scratch memory from a separate allocator."""
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    gradients(by(provider), make(256, 256, torch.bfloat16, device(provider, torch.bfloat16)))
    assert _allocation._allocator.get() is before


def test_choice_is_measured() -> None:
    choice = choose_loss(2048, 1024, 1024, torch.bfloat16, torch.device("cuda"))
    assert choice.provider in LOSS_CANDIDATES
    assert choice.provider in choice.milliseconds and "reference" in choice.milliseconds
    assert all(took > 0 for took in choice.milliseconds.values())
    assert not choice.failed
