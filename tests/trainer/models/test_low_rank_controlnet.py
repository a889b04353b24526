"""A ControlNet with low-rank pairs on FLUX's weights against a full one with the merged weights."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from bifrost.recipes import RecipeError, load_recipe
from bifrost.recipes.stage2 import ControlLora
from bifrost.trainer.bench.controlnet_shapes import control_shape
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.controlnet_config import ControlNetConfig
from bifrost.trainer.models.flux import image_ids
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.latent_controlnet import LatentControlNet
from bifrost.trainer.models.low_rank import AdaptedLinear, share
from bifrost.trainer.stages import open_controlnet
from small_flux import CONFIG as FLUX
from small_flux import InMemory

WIDTH = 12
ALL: Any = ["attention", "mlp", "modulation", "embedders"]
PAIRS = ControlLora(rank=3, alpha=6)


def build(flux: FluxTransformer, lora: ControlLora | None, double: int = 2, single: int = 1) -> LatentControlNet:
    """A ControlNet whose output layers are not zero, equal in all that does not depend on `lora`."""
    shape = ControlNetConfig.of(FLUX, WIDTH, 2, 4, double=double, single=single, norm="group")
    model = LatentControlNet(replace(shape, lora=lora)).double()
    model.initialise(InMemory(flux), "flux", 0)
    if lora:
        share([model], [flux])
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_"):
            parameter.data.normal_(std=0.3, generator=draw)
    return model


def flux() -> FluxTransformer:
    torch.manual_seed(0)
    return FluxTransformer.build(FLUX).requires_grad_(False).double()


def inputs() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    noisy, text, pooled = (torch.randn(s, generator=draw) for s in ((2, 16, 16), (2, 5, 24), (2, 20)))
    latents = torch.randn(2, 4, WIDTH, generator=draw)
    levels = torch.tensor([0.2, 0.9]), torch.full((2,), 3.5)
    return [x.double() for x in (noisy, latents, text, pooled, *levels, image_ids(8, 8), torch.zeros(5, 3))]


def outputs(model: LatentControlNet) -> list[torch.Tensor]:
    return [residual for part in model(*inputs()) for residual in part]


def pairs(model: LatentControlNet) -> dict[str, AdaptedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear) and m.lora_A is not None}


@torch.no_grad()
def merge(full: LatentControlNet, paired: LatentControlNet, scale: float) -> None:
    for name, module in pairs(paired).items():
        assert module.lora_A is not None and module.lora_B is not None
        full.get_submodule(name).weight += scale * module.lora_B @ module.lora_A


def close(found: Any, wanted: Any) -> None:
    """In fp64."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_at_the_start_it_is_the_full_one() -> None:
    transformer = flux()
    paired, full = build(transformer, PAIRS), build(transformer, None)
    for a, b in zip(outputs(paired), outputs(full), strict=True):
        assert b.abs().max() > 0.1
        close(a, b)
    blocks = sum(p.numel() for p in full.parameters())
    assert sum(p.numel() for p in paired.parameters()) < 0.5 * blocks


@pytest.mark.parametrize("targets", [ALL, ["attention"], ["mlp"], ["attention", "mlp"], ["modulation"], ["embedders"]])
@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("blocks", [(2, 1), (0, 2)], ids=str)
def test_gradients_are_those_of_the_merged_weights(targets: Any, recomputed: bool, blocks: tuple[int, int]) -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T; everything else has the full one's gradients."""
    transformer = flux()
    paired, full = build(transformer, ControlLora(rank=3, alpha=6, targets=targets), *blocks), None
    draw = torch.Generator().manual_seed(5)
    for module in pairs(paired).values():
        assert module.lora_B is not None
        module.lora_B.data.normal_(std=0.2, generator=draw)
    full = build(transformer, None, *blocks)
    before = outputs(full)
    merge(full, paired, 2.0)
    for model in (paired, full):
        if recomputed:
            model.enable_gradient_checkpointing()
        found = outputs(model.train())
        sum(residual.square().sum() for residual in found).backward()
    moved = [(a - b).abs().max() for a, b in zip(outputs(full), before, strict=True)]
    assert min(moved) > 1e-3, "the pairs matter"
    for a, b in zip(outputs(paired), outputs(full), strict=True):
        close(a, b)
    weights: Any = dict(full.named_parameters())
    for name, module in pairs(paired).items():
        assert module.lora_A is not None and module.lora_B is not None
        gradient = weights[f"{name}.weight"].grad
        if gradient is None:  # of the last block's text, which nothing reads
            continue
        close(module.lora_A.grad, 2.0 * module.lora_B.T @ gradient)
        close(module.lora_B.grad, 2.0 * gradient @ module.lora_A.T)
    for name, parameter in paired.named_parameters():
        if "lora" not in name and weights[name].grad is not None:
            close(parameter.grad, weights[name].grad)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_at_full_rank_pairs_are_any_change_of_the_weights() -> None:
    """A = 1 and B = D / s give a full ControlNet with the weights W + D."""
    transformer = flux()
    rank = 5 * 32
    paired, full = build(transformer, ControlLora(rank=rank, alpha=2 * rank)), build(transformer, None)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, module in pairs(paired).items():
            assert module.lora_A is not None and module.lora_B is not None
            weight: Any = full.get_submodule(name).weight
            change = 0.1 * torch.randn(weight.shape, generator=draw)
            weight += change
            width = min(rank, weight.shape[1])  # the first layers read more than the rank: change what it spans
            weight[:, width:] -= change[:, width:]
            module.lora_A.copy_(torch.eye(rank, weight.shape[1]))
            module.lora_B.zero_()[:, :width] = change[:, :width] / 2
    for a, b in zip(outputs(paired), outputs(full), strict=True):
        close(a, b)


def test_settings_without_effect_are_refused() -> None:
    for settings, message in (
        (["controlnet.lora.rank=4"], "set controlnet.weights=lora"),
        (["controlnet.weights=lora", "controlnet.bridge=queries"], "copies no weights of FLUX"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            load_recipe("tiny-controlnet", settings)
    stage = open_controlnet(load_recipe("tiny-controlnet", ["controlnet.weights=lora"]), for_counting=True)
    with pytest.raises(RunError, match="benchmarks measure a copy of FLUX's blocks"):
        control_shape(stage)
