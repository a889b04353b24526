"""Our FLUX blocks equal diffusers' in output and gradients, and keep less for the backward pass."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bifrost.trainer.models.flux import image_ids, velocity
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.latent_controlnet import Residuals

CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (8, 12, 12),
}
WIDTH, TEXT, SIDE = 128, 20, 24
TOKENS = (SIDE // 2) ** 2


def pair(guided: bool, trained: bool = False) -> tuple[FluxTransformer2DModel, FluxTransformer]:
    """diffusers' model and ours with equal weights; no norm's weights are ones."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**CONFIG, guidance_embeds=guided).requires_grad_(trained)
    for name, parameter in theirs.named_parameters():
        if "norm_" in name and parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 1.5)
    ours = FluxTransformer.build({**CONFIG, "guidance_embeds": guided}).requires_grad_(trained)
    ours.load_state_dict(theirs.state_dict())  # equal names
    return theirs, ours


def passed(model: Any, dtype: torch.dtype, counts: tuple[int, int], recomputed: bool, guided: bool) -> dict[str, Any]:
    """Velocity and all gradients of `counts` residuals for the double and the single blocks."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if recomputed:
        model.enable_gradient_checkpointing()
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    double, single = (tuple(normal(2, TOKENS, WIDTH).requires_grad_() for _ in range(n)) for n in counts)
    found = velocity(
        model,
        normal(2, TOKENS, 16),
        Residuals(double, single),
        normal(2, TEXT, 24),
        normal(2, 20),
        torch.tensor([0.2, 0.9]),
        torch.full((2,), 3.5) if guided else None,
        image_ids(SIDE, SIDE),
        torch.zeros(TEXT, 3),
    )
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    gradients = {f"residual {i}": x.grad for i, x in enumerate((*double, *single))}
    gradients |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"velocity": found.detach(), **gradients}


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("counts", "guided"), [((2, 1), True), ((0, 3), True), ((3, 0), False)])
@pytest.mark.parametrize(
    ("dtype", "limit", "dense"),
    [(torch.float32, 1e-6, False), (torch.bfloat16, 1e-2, False), (torch.bfloat16, 1e-2, True)],
    ids=["fp32", "bf16", "bf16, dense attention"],
)
def test_a_frozen_flux_equals_diffusers(
    dtype: torch.dtype,
    limit: float,
    dense: bool,
    counts: tuple[int, int],
    guided: bool,
    recomputed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not dense:
        monkeypatch.setattr(importlib.import_module("bifrost.kernels.dense_attention"), "MOST_KEYS", 0)
    wanted, found = (passed(model, dtype, counts, recomputed, guided) for model in pair(guided))
    for name, tensor in wanted.items():
        assert (found[name] - tensor).float().norm() <= limit * tensor.float().norm(), name


@pytest.mark.parametrize("recomputed", [False, True], ids=["stored", "recomputed"])
def test_gradients_of_trained_blocks_equal_diffusers(recomputed: bool) -> None:
    wanted, found = (passed(model, torch.float32, (1, 1), recomputed, True) for model in pair(True, trained=True))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Keys' biases shift all scores of a query alike: their gradients are rounding.
        assert (found[name] - tensor).norm() <= 2e-5 * tensor.norm() + 1e-6, name
