"""Stage 2 equals the public release: residuals, velocity, loss and every gradient, in both modes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bifrost.trainer.models import flux, weights
from bifrost.trainer.models.flux_transformer import FluxTransformer
from bifrost.trainer.models.latent_controlnet import ControlNetConfig, LatentControlNet, Residuals

TOLERANCE = 1e-5


class Case:
    def __init__(self, path: Path) -> None:
        config = json.loads(path.with_name(f"{path.name}.config.json").read_text())
        self.data = load_file(path.with_name(f"{path.name}.case.safetensors"))
        self.scale = config["conditioning_scale"]
        self.flux = FluxTransformer.build(config["flux"]).requires_grad_(False)
        self.flux.load_state_dict(load_file(path.with_name(f"{path.name}.flux.safetensors")))
        grids = (round(self.data[name].shape[1] ** 0.5) for name in ("patch_latents", "noisy_latents"))
        control = config["controlnet"]
        self.controlnet = LatentControlNet(
            ControlNetConfig.of(
                config["flux"], control["latent_dim"], *grids, control["num_layers"], control["num_single_layers"]
            )
        )
        files = weights.WeightFiles(path.with_name(f"{path.name}.controlnet.safetensors"))
        self.controlnet.load(files, files.path)
        assert {*dict(self.controlnet.named_parameters()), *self.controlnet.statistics()} == set(files.names)

    def residuals(self) -> Residuals:
        inputs = (self.data[n] for n in ("noisy_latents", "patch_latents", *_CONDITIONS))
        return self.controlnet(*inputs, scale=self.scale)

    def velocity(self, residuals: Residuals) -> torch.Tensor:
        return flux.velocity(self.flux, self.data["noisy_latents"], residuals, *(self.data[n] for n in _CONDITIONS))


_CONDITIONS = ("text", "pooled", "timestep", "guidance", "img_ids", "txt_ids")


@pytest.fixture
def case(controlnet_case: Path) -> Case:
    return Case(controlnet_case)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted.view_as(found), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_residuals_velocity_loss_and_gradients(case: Case, mode: str, checkpointing: bool) -> None:
    case.controlnet.train(mode == "train")
    if checkpointing:
        case.controlnet.enable_gradient_checkpointing()
        case.flux.enable_gradient_checkpointing()
    residuals = case.residuals()
    close(torch.cat(residuals.double), case.data[f"{mode}.block"])
    close(torch.cat(residuals.single), case.data[f"{mode}.single"])
    velocity = case.velocity(residuals)
    close(velocity, case.data[f"{mode}.velocity"])
    loss = torch.nn.functional.mse_loss(velocity, case.data["target"])
    close(loss, case.data[f"{mode}.loss"])
    loss.backward()
    prefix = f"{mode}.grad."
    wanted = {name.removeprefix(prefix): grad for name, grad in case.data.items() if name.startswith(prefix)}
    found = dict(case.controlnet.named_parameters())
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert found[name].grad is not None, name
        close(found[name].grad, grad)
    assert all(p.grad is None for p in case.flux.parameters())


def test_positions(case: Case) -> None:
    side = 2 * round(case.data["noisy_latents"].shape[1] ** 0.5)
    assert torch.equal(flux.image_ids(side, side), case.data["img_ids"])
    assert not case.data["txt_ids"].any()


def test_running_statistics_are_updated_only_in_training_mode(case: Case) -> None:
    before = {name: buffer.clone() for name, buffer in case.controlnet.statistics().items()}
    case.controlnet.eval()
    case.residuals()
    assert all(torch.equal(buffer, before[name]) for name, buffer in case.controlnet.statistics().items())
    case.controlnet.train()
    case.residuals()
    assert not any(torch.equal(buffer, before[name]) for name, buffer in case.controlnet.statistics().items())
