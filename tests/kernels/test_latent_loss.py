"""The head and its loss against the formula written out in fp64."""

import pytest
import torch
from bifrost.kernels import PatchLatentHead, patch_latent_loss


def formula(hidden, weight, bias, target, token_weight, normalizer):
    error = hidden.double() @ weight.double().T + bias.double() - target.double()
    return (error.square().mean(-1) * token_weight.double()).sum() / normalizer


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((37, 24), (24, 24), (24,), (37, 24), (37,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_loss_and_gradients(tensors: list[torch.Tensor]) -> None:
    hidden, weight, bias, target, token_weight = tensors
    trained = [t.float().requires_grad_() for t in (hidden, weight, bias)]
    loss, squares = patch_latent_loss(*trained, target.float(), token_weight.abs().float(), 11.0)
    exact = [t.detach().double().requires_grad_() for t in trained]
    wanted = formula(*exact, target, token_weight.abs(), 11.0)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    loss.backward()
    wanted.backward()
    for ours, theirs in zip(trained, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert squares.shape == (37,)
    assert not squares.requires_grad


def test_the_loss_is_fp32_whatever_comes_in(tensors: list[torch.Tensor]) -> None:
    hidden, weight, bias, target, _ = (t.bfloat16() for t in tensors)
    loss, squares = patch_latent_loss(hidden, weight, bias, target, torch.ones(37), 37.0)
    assert loss.dtype == squares.dtype == torch.float32


def test_head_gives_predictions_or_the_loss() -> None:
    head = PatchLatentHead(24)
    hidden, target = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    prediction = head(hidden)
    assert prediction.shape == hidden.shape
    loss, _ = head(hidden, target, None, 10.0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, target))
