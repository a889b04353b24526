"""Decoding with a flow head: samples by seed, of runs and exports, and what a linear head refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

import run_folders
from bifrost.kernels import PrefixLayout
from bifrost.recipes import RecipeError, load_recipe
from bifrost.trainer.checkpoint.export import export
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.generator import Generator
from bifrost.trainer.inference.masked_decoding import draw_latent_noise, draw_orders, reveal_counts
from bifrost.trainer.inference.settings import Settings
from bifrost.trainer.models.rng import Stream, uniform
from bifrost.trainer.stages import open_patch_latents

PROMPTS, SEEDS = ["a red apple", "moon", "two owls"], [3, 4, 5]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    recipe = load_recipe("tiny-mllm", ["branch={head: flow, flow_head: {layers: 2, steps: 3}}"])
    return run_folders.save(place / "flow", recipe, 3)


@pytest.fixture(scope="module")
def flow(run: Path, controlnet: Path) -> Generator:
    return Generator.load(run, controlnet)


@torch.no_grad()
def plain(generator: Generator, prompt: str, seed: int, settings: Settings) -> torch.Tensor:
    """One image's latents [N, D], predicting every patch in every step."""
    model, patches = generator.mllm, 16
    input_ids, lengths = generator.template.batch([prompt])
    prefix = model.backbone.prefix(input_ids, PrefixLayout.of(lengths, patches))
    width = model.branch.config.hidden_size
    draws = uniform(0, Stream.LATENT_NOISE, np.array([-1]), np.array([seed]), patches * width)
    noise = settings.temperature * torch.special.ndtri(torch.from_numpy(draws)).float().view(patches, width)
    latents, hidden = torch.zeros(1, patches, width), torch.ones(1, patches, dtype=torch.bool)
    order = draw_orders([seed], patches)[0].tolist()
    for count in reveal_counts(patches, settings.steps, settings.schedule):
        found = model.head.sample(model.branch(latents, hidden, prefix), noise)
        for patch in order[:count]:
            latents[0, patch], hidden[0, patch] = found[patch], False
        order = order[count:]
    return latents[0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_latents_are_samples_by_seed(flow: Generator, temperature: float) -> None:
    settings = Settings(steps=4, temperature=temperature)
    found = flow.latents(PROMPTS, SEEDS, settings)
    for number, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        torch.testing.assert_close(found[number], plain(flow, prompt, seed, settings), atol=1e-4, rtol=1e-4)
    again, other = flow.latents(PROMPTS[:1] * 2, [SEEDS[0], 9], Settings(steps=1, temperature=temperature))
    assert (again - other).norm() > 0.1 * again.norm(), "all patches in one step: the noise alone differs"


def test_an_export_gives_the_same_latents(flow: Generator, run: Path, controlnet: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "hf", dtype=torch.float32)
    settings = Settings(steps=2, guidance=2.0)
    exported = Generator.load(tmp_path / "out", controlnet)
    assert torch.equal(exported.latents(PROMPTS, SEEDS, settings), flow.latents(PROMPTS, SEEDS, settings))


def test_a_linear_head_refuses_a_temperature(generator: Generator) -> None:
    assert draw_latent_noise(generator.mllm.head, [0], 16) is None
    with pytest.raises(RunError, match="this model's head is linear"):
        generator.latents(["moon"], [0], Settings(temperature=0.9))


def test_the_public_layout_is_refused(mllm: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"branch\.head is flow, and the public layout has a linear head"):
        export(run, tmp_path / "out", "public")
    export(mllm, tmp_path / "public", "public")
    recipe = load_recipe(run / "recipe.yaml")
    with pytest.raises(RunError, match=r"has the public layout, with a linear head; set branch\.head=linear"):
        open_patch_latents(recipe).from_public_checkpoint(tmp_path / "public")


def test_settings_of_a_flow_head_need_one() -> None:
    with pytest.raises(RecipeError, match=r"flow_head is for branch\.head=flow"):
        load_recipe("tiny-mllm", ["branch.flow_head.layers=2"])
