"""Norms and SwiGLU that keep little, against autograd of the formulas, and Liger's kernels in their place.

Liger's need a GPU: here, torch functions of their contract stand in for them.
"""

import pytest
import torch
from torch import nn

from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.models import elementwise
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.kernel_selection import KernelChoice
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

calls = {"norm": 0, "product": 0, "forward": 0, "backward": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_formulas(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    norm, down = elementwise.RmsNorm(24, 1e-6).to(dtype), elementwise.GatedDown(40, 24, bias=False).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(24))
    hidden, gate, up = normal(2, 7, 24), normal(2, 7, 40), normal(2, 7, 40)

    def formulas() -> torch.Tensor:
        exact = hidden.to(torch.promote_types(dtype, torch.float32))
        normed = norm.weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        return normed + nn.functional.linear(nn.functional.silu(gate) * up, down.weight)

    inputs = hidden, norm.weight, gate, up, down.weight
    gradient = normal(2, 7, 24).detach()
    wanted, found = formulas(), norm(hidden) + down(gate, up, recomputed=False)
    torch.testing.assert_close(found, wanted)
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (found, wanted)), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_inputs_survive_the_backward_pass() -> None:
    """Gate and up are outputs of other layers, whose backward pass may still read them."""
    gate, up = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    before = gate.detach().clone(), up.detach().clone()
    elementwise.GatedDown(8, 4, bias=False)(gate, up, recomputed=False).sum().backward()
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])


class Norm:
    @staticmethod
    def apply(hidden, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False)
        calls["norm"] += 1
        exact = hidden.float()
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


class Product(elementwise.SwiGlu):
    @staticmethod
    def apply(gate, up):
        calls["product"] += 1
        return nn.functional.silu(gate) * up

    @staticmethod
    def forward(gate, up):
        calls["forward"] += 1
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(gradient, gate, up):
        """Liger's overwrites gate and up."""
        calls["backward"] += 1
        with torch.enable_grad():
            inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
            d_gate, d_up = torch.autograd.grad(nn.functional.silu(inputs[0]) * inputs[1], inputs, gradient)
        return gate.copy_(d_gate), up.copy_(d_up)


def built(choice: KernelChoice) -> PatchLatentModel:
    folder = locate("builtin:tiny")
    recipe = load_recipe("tiny-mllm")
    model = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size, kernels=choice)
    model.load(WeightFiles(folder), seed=0)
    return model


def losses(model: PatchLatentModel, device: str = "cpu") -> list[torch.Tensor]:
    """Loss and gradients of one batch."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 192, generator=draw).to(device)
    mask = torch.rand(2, 16, generator=draw).to(device) > 0.3
    prefix = model.backbone.prefix(torch.arange(10, 30, device=device), PrefixLayout.of([12, 8], 16, device))
    loss = model.losses(latents, mask, mask.flatten().nonzero()[:, 0], prefix, 32.0).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.trainable().values()))]


def test_every_norm_and_product_of_the_layers_is_ligers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_liger", lambda: (Norm, Product))
    plain, fused = built(KernelChoice()), built(KernelChoice(elementwise="liger"))
    calls.update(dict.fromkeys(calls, 0))
    wanted = losses(plain)
    assert not any(calls.values())
    for ours, theirs in zip(losses(fused), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    text, branch = list(fused.backbone.text.layers), len(fused.branch.layers)
    # Of the text's last layer only keys and values are wanted, and no final norm; the branch's has a kernel of ours.
    assert calls == {
        "norm": 2 * (len(text) - 1) + 1 + 2 * branch,
        "product": len(text) - 1,
        "forward": 2 * branch,
        "backward": branch,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_computes_what_torch_does() -> None:
    pytest.importorskip("liger_kernel")
    plain, fused = (built(choice).cuda() for choice in (KernelChoice(), KernelChoice(elementwise="liger")))
    for ours, theirs in zip(losses(fused, "cuda"), losses(plain, "cuda"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
