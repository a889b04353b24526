"""The tiny FLUX in `builtin:tiny-flux`: it loads, its autoencoder reconstructs drawings, and it follows captions."""

import hashlib
from pathlib import Path

import pytest
import resvg_py
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, T5EncoderModel

from bifrost.data import demo
from bifrost.data.openmoji import find_drawings
from bifrost.data.transforms import decode_image
from bifrost.recipes import FOLDER

FOUNDATIONS = FOLDER / "foundations"
FLUX = FOUNDATIONS / "tiny-flux"
CAPTIONS, PIXELS = 12, 64


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FLUX, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def drawings() -> tuple[list[str], Tensor]:
    """CAPTIONS names, evenly spaced in the demo's training split, and their drawings [CAPTIONS, 3, 64, 64], -1 .. 1."""
    svgs = find_drawings()
    train = [name for name in svgs if int(hashlib.md5(name.encode()).hexdigest(), 16) % 20]
    names = train[:: len(train) // CAPTIONS][:CAPTIONS]
    return names, torch.stack([render(svgs[name]) for name in names])


def render(svg: Path) -> Tensor:
    png = resvg_py.svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8"),
        width=demo.PIXELS,
        height=demo.PIXELS,
        background="#ffffff",
        skip_system_fonts=True,
    )
    return torch.tensor(decode_image(bytes(png), PIXELS)).permute(2, 0, 1) / 127.5 - 1


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


def test_autoencoder_reconstructs_drawings(pipeline: FluxPipeline, drawings: tuple[list[str], Tensor]) -> None:
    _, real = drawings
    config = pipeline.vae.config
    with torch.no_grad():
        z = pipeline.vae.encode(F.pixel_unshuffle(real, config._bifrost_space_to_depth)).latent_dist.mean
        assert z.shape == (CAPTIONS, 16, 16, 16)
        z = (z - config.shift_factor) * config.scaling_factor
        again = decode(pipeline, z)
    assert z.std() == pytest.approx(1, abs=0.2)
    error = (again - real).square().mean()
    assert 10 * (4 / error).log10() >= 29


@pytest.mark.slow
def test_generated_drawings_match_their_captions(pipeline: FluxPipeline, drawings: tuple[list[str], Tensor]) -> None:
    names, real = drawings
    packed = pipeline(
        names,
        height=16,
        width=16,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert packed.shape == (CAPTIONS, 64, 64)
    with torch.no_grad():
        drawn = decode(pipeline, FluxPipeline._unpack_latents(packed, 16, 16, 1))
    nearest = torch.cdist(drawn.flatten(1), real.flatten(1)).argmin(dim=1)
    right = (nearest == torch.arange(CAPTIONS)).float().mean()
    assert right >= 0.5  # chance is 1 / CAPTIONS
