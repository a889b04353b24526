"""Stage 1 equals the public release: latents, hidden states, prediction, losses and every gradient."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig

from bifrost.kernels import PrefixLayout
from bifrost.recipes import Recipe
from bifrost.trainer.bench.dense import DenseStep
from bifrost.trainer.models.backbone import Prefix
from bifrost.trainer.models.weights import WeightFiles, fill, public_name
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

TOLERANCE = 1e-5


class Case:
    def __init__(self, path: Path) -> None:
        config = json.loads(path.with_name(f"{path.name}.config.json").read_text())
        self.weights = WeightFiles(path.with_name(f"{path.name}.weights.safetensors"))
        self.data = load_file(path.with_name(f"{path.name}.case.safetensors"))
        self.grid = config["grid"]
        self.positions = config["positions"]
        self.config = Qwen2_5_VLConfig(text_config=config["lm"], vision_config=config["vision"])

    def model(self, loss_tokens: str) -> PatchLatentModel:
        vision = self.config.vision_config
        recipe = Recipe.model_validate(
            {
                "stage": "patch-latents",
                "name": "conformance",
                "steps": 1,
                "global_batch": 1,
                "micro_batch": 1,
                "precision": "fp32",
                "backbone": {"path": "unused"},
                "branch": {"positions": self.positions, "loss_tokens": loss_tokens},
                "data": {
                    "shards": "unused",
                    "image_size": self.grid * vision.patch_size * vision.spatial_merge_size,
                },
            }
        )
        model = PatchLatentModel(self.config, recipe.branch, recipe.data.image_size)
        model.load(self.weights, seed=0)
        fill({public_name(n): p for n, p in model.trainable().items()}, self.weights, self.weights.path)
        return model

    def latents(self, model: PatchLatentModel) -> torch.Tensor:
        samples = len(self.data["input_ids"])
        return model.backbone.latents_of_patches(self.data["pixel_patches"], samples, 2 * self.grid)

    def prefix(self, model: PatchLatentModel) -> Prefix:
        """The case's prompts are left-padded; ours are packed."""
        real = self.data["text_mask"].bool()
        layout = PrefixLayout.of(real.sum(dim=1).tolist(), self.grid**2)
        return model.backbone.prefix(self.data["input_ids"][real], layout)

    def hidden(self, model: PatchLatentModel) -> torch.Tensor:
        return model.branch(self.data["patch_latents"], self.data["mask"].bool(), self.prefix(model))


@pytest.fixture
def case(patch_latent_case: Path) -> Case:
    return Case(patch_latent_case)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted.view_as(found), atol=TOLERANCE, rtol=0)


def test_position_ids(case: Case) -> None:
    real, wanted = case.data["text_mask"].bool(), case.data["position_ids"]
    lengths = real.sum(dim=1)
    assert torch.equal(
        PrefixLayout.of(lengths.tolist(), 1).positions.expand(3, -1), wanted[:, :, : real.shape[1]][:, real]
    )
    assert torch.equal(case.model("all").branch.position_ids(lengths), wanted[:, :, real.shape[1] :])


def test_patch_latents(case: Case) -> None:
    close(case.latents(case.model("all")), case.data["patch_latents"])


def test_hidden_states_and_prediction(case: Case) -> None:
    model = case.model("all")
    hidden = case.hidden(model)
    close(hidden, case.data["hidden"])
    close(model.head(hidden), case.data["prediction"])


@pytest.mark.parametrize("loss_tokens", ["all", "masked"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_loss_and_every_gradient(case: Case, loss_tokens: str, checkpointing: bool) -> None:
    model = case.model(loss_tokens)
    model.branch.activation_checkpointing = checkpointing
    mask = case.data["mask"].bool()
    normalizer = float(mask.numel() if loss_tokens == "all" else mask.sum())
    masked = mask.flatten().nonzero()[:, 0]
    losses = model.losses(case.data["patch_latents"], mask, masked, case.prefix(model), normalizer)
    close(losses.loss, case.data[f"loss_{loss_tokens}"])
    losses.loss.backward()
    prefix = f"grad_{loss_tokens}."
    wanted = {name.removeprefix(prefix): grad for name, grad in case.data.items() if name.startswith(prefix)}
    found = {public_name(n).removeprefix("vision_language_model."): p.grad for n, p in model.trainable().items()}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert found[name] is not None, name
        close(found[name], grad)
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_benchmark_baseline_equals_the_release(case: Case, attention: str, checkpointing: bool) -> None:
    """The baseline of `bifrost bench step` has the loss and gradients of the release."""
    model = case.model("all")
    model.branch.activation_checkpointing = checkpointing
    data = case.data
    dense = DenseStep(model, attention)
    loss = dense.loss(data["patch_latents"], data["mask"].bool(), data["input_ids"], data["text_mask"].bool())
    close(loss, data["loss_all"])
    loss.backward()
    found = {public_name(n).removeprefix("vision_language_model."): p.grad for n, p in model.trainable().items()}
    for name, grad in found.items():
        assert grad is not None, name
        close(grad, data[f"grad_all.{name}"])


def test_text_does_not_depend_on_images_or_training(case: Case) -> None:
    """Spec 1.3: no text activation depends on an image token or a trainable weight."""
    model = case.model("all")
    before = case.prefix(model)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    after = case.prefix(model)
    assert all(torch.equal(a, b) for a, b in zip(before.keys, after.keys, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before.values, after.values, strict=True))
