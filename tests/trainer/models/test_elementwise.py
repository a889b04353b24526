"""Liger's kernels in Qwen's layers. They need a GPU: here, torch functions of their contract stand in for them."""

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, Qwen2MLP

from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.kernel_choice import KernelChoice
from bifrost.trainer.models import elementwise
from bifrost.trainer.models.backbone import locate, read_config
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages.patch_latents import PatchLatentModel

calls = {"norm": 0, "product": 0}


class Norm:
    @staticmethod
    def apply(hidden, weight, eps, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False)
        calls["norm"] += 1
        exact = hidden.float()
        return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


class Product:
    @staticmethod
    def apply(gate, up):
        calls["product"] += 1
        return nn.functional.silu(gate) * up


def built(choice: KernelChoice) -> PatchLatentModel:
    folder = locate("builtin:tiny")
    model = PatchLatentModel(read_config(folder), load_recipe("tiny-mllm"), choice)
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
    wanted = losses(plain)
    assert calls == {"norm": 0, "product": 0}
    for ours, theirs in zip(losses(fused), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    parts = [*fused.backbone.text.modules(), *fused.branch.modules()]
    assert calls["product"] == sum(type(part) is Qwen2MLP for part in parts)
    assert calls["norm"] == sum(type(part) is Qwen2_5_VLRMSNorm for part in parts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_computes_what_torch_does() -> None:
    pytest.importorskip("liger_kernel")
    plain, fused = (built(choice).cuda() for choice in (KernelChoice(), KernelChoice(elementwise="liger")))
    for ours, theirs in zip(losses(fused, "cuda"), losses(plain, "cuda"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
