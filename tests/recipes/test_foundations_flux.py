"""The tiny FLUX in `builtin:tiny-flux`: it loads, its autoencoder reconstructs scenes, and it knows the objects that
captions name, but not where they belong."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, T5EncoderModel

from bifrost.data.scenes.grammar import Scene, render
from bifrost.data.scenes.heldout import heldout_scenes, training_scenes
from bifrost.data.scenes.scorer import score_images
from bifrost.data.transforms import resized
from bifrost.recipes import FOLDER

FOUNDATIONS = FOLDER / "foundations"
FLUX = FOUNDATIONS / "tiny-flux"
PIXELS = 64


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FLUX, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(scenes: list[Scene]) -> Tensor:
    """[n, 3, 64, 64], -1 .. 1."""
    return torch.stack([torch.tensor(resized(render(scene), PIXELS)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])


def generated(pipeline: FluxPipeline, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """What the images of the scenes' captions show, by category."""
    packed = pipeline(
        [scene.caption for scene in scenes],
        height=16,
        width=16,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert packed.shape == (len(scenes), 64, 64)
    with torch.no_grad():
        pixels = decode(pipeline, FluxPipeline._unpack_latents(packed, 16, 16, 1))
    return score_images(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), scenes)


def decode(pipeline: FluxPipeline, z: Tensor) -> Tensor:
    """Pixels [n, 3, 64, 64] of latents [n, 16, 16, 16]."""
    config = pipeline.vae.config
    depth = pipeline.vae.decode(z / config.scaling_factor + config.shift_factor).sample
    return F.pixel_shuffle(depth, config._bifrost_space_to_depth).clamp(-1, 1)


def test_folder_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in FOUNDATIONS.rglob("*") if file.is_file()) <= 24e6
    assert {path.name for path in FLUX.iterdir()} == {
        *("LICENSE.txt", "model_index.json", "scheduler", "text_encoder", "text_encoder_2"),
        *("tokenizer", "tokenizer_2", "transformer", "vae"),
    }


def test_loads_as_a_flux_pipeline(pipeline: FluxPipeline) -> None:
    assert type(pipeline.transformer) is FluxTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.text_encoder) is CLIPTextModel
    assert type(pipeline.text_encoder_2) is T5EncoderModel
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    transformer = pipeline.transformer.config
    assert transformer.guidance_embeds
    assert transformer.joint_attention_dim == pipeline.text_encoder_2.config.d_model
    assert transformer.pooled_projection_dim == pipeline.text_encoder.config.hidden_size
    assert transformer.in_channels == 4 * pipeline.vae.config.latent_channels


def test_autoencoder_reconstructs_scenes(pipeline: FluxPipeline) -> None:
    real = images_of(heldout_scenes(2, 3))
    config = pipeline.vae.config
    with torch.no_grad():
        z = pipeline.vae.encode(F.pixel_unshuffle(real, config._bifrost_space_to_depth)).latent_dist.mean
        assert z.shape == (len(real), 16, 16, 16)
        z = (z - config.shift_factor) * config.scaling_factor
        again = decode(pipeline, z)
    assert z.std() == pytest.approx(1, abs=0.2)
    error = (again - real).square().mean()
    assert 10 * (4 / error).log10() >= 28


@pytest.mark.slow
def test_it_knows_the_objects_and_not_their_places(pipeline: FluxPipeline) -> None:
    drawn = training_scenes(400, 3)
    seen = [scene for name in ("single", "colour") for scene in [s for s in drawn if s.category == name][:8]]
    held_out = [scene for scene in heldout_scenes(16, 3) if scene.category == "position"]
    found = generated(pipeline, seen + held_out)
    assert found["colour"]["all"] >= 0.85 and found["single"]["all"] >= 0.85, found
    assert found["position"]["set"] >= 0.5, found
    assert found["position"]["all"] <= 0.3, found  # chance is 1 / 8 if the objects are right
