"""FLUX's sampler equals diffusers' pipeline up to rounding, plus the ControlNet's residuals."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import tiny_flux
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.flux_sampler import Text, draw_noise, noise_levels, sample
from bifrost.trainer.inference.settings import Sampling
from bifrost.trainer.models.flux import FluxFolder, FluxTokenizers, FrozenFlux, image_ids, pack, velocity
from bifrost.trainer.models.latent_controlnet import ControlNetConfig, LatentControlNet

PROMPTS = ["a red apple", "moon"]
SIDE, TOKENS, CHANNELS, WIDTH = 16, 64, 16, 12


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    made = tiny_flux.pipeline()
    with torch.no_grad():  # text, time and guidance are all to show in the velocity
        made.transformer.proj_out.weight.mul_(3)
        made.transformer.context_embedder.weight.mul_(20)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def flux(pipeline: FluxPipeline, tmp_path_factory) -> FrozenFlux:
    model = FrozenFlux(FluxFolder.open(tiny_flux.save(pipeline, tmp_path_factory.mktemp("flux"))))
    model.load()
    return model


def text_of(flux: FrozenFlux, prompts: list[str]) -> Text:
    return Text(*flux.encode_text(FluxTokenizers(flux.folder)(prompts)))


def sampled(flux: FrozenFlux, noise: Tensor, settings: Sampling, *given) -> Tensor:
    """Packed latents [B, 64, 16]."""
    return pack(sample(flux, text_of(flux, PROMPTS), noise, settings, *given, empty=text_of(flux, [""])))


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize(("steps", "guidance"), [(1, 3.5), (9, 3.5), (9, 1.0)])
def test_without_a_controlnet_it_is_diffusers_pipeline(pipeline, flux, steps: int, guidance: float, cfg: float) -> None:
    noise = draw_noise([3, 4], TOKENS, CHANNELS)
    found = sampled(flux, noise, Sampling(steps, guidance, cfg=cfg))
    wanted = pipeline(
        PROMPTS,
        negative_prompt=["", ""],
        true_cfg_scale=cfg,
        height=2 * SIDE,
        width=2 * SIDE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        max_sequence_length=13,
        output_type="latent",
    ).images
    assert (wanted - noise).abs().mean() > 0.1 and (wanted[0] - noise[0] - wanted[1] + noise[1]).abs().mean() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_pixels_are_those_of_the_pipelines_vae(pipeline: FluxPipeline, flux: FrozenFlux) -> None:
    latents = sample(flux, text_of(flux, PROMPTS), draw_noise([3, 4], TOKENS, CHANNELS), Sampling(4))
    assert latents.shape == (2, 4, SIDE, SIDE)
    with torch.no_grad():
        wanted = torch.nn.functional.pixel_shuffle(pipeline.vae.decode(latents / 0.7 + 0.2).sample, 2)
    found = flux.decode_latents(latents)
    assert found.shape == (2, 3, 64, 64)
    torch.testing.assert_close(found / 127.5 - 1, wanted.clamp(-1, 1), atol=0.005, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"use_dynamic_shifting": False, "shift": 1.0},
        {"base_shift": 0.3, "max_shift": 2.0, "base_image_seq_len": 16, "max_image_seq_len": 64},
    ],
    ids=["dev", "schnell", "other shift"],
)
def test_noise_levels_are_the_pipelines(scheduler: dict, tmp_path: Path) -> None:
    pipeline = tiny_flux.pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler})
    pipeline.set_progress_bar_config(disable=True)
    folder = FluxFolder.open(tiny_flux.save(pipeline, tmp_path))
    noise = draw_noise([1], TOKENS, CHANNELS)
    pipeline(
        "",
        height=2 * SIDE,
        width=2 * SIDE,
        num_inference_steps=5,
        latents=noise,
        max_sequence_length=13,
        output_type="latent",
    )
    assert noise_levels(folder, TOKENS, 5) == pytest.approx(pipeline.scheduler.sigmas.tolist(), abs=1e-6)


def test_noise_depends_on_the_seed_only() -> None:
    noise = draw_noise([5, 6, 5], TOKENS, CHANNELS)
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[1], draw_noise([6], TOKENS, CHANNELS)[0])
    many = draw_noise(range(400), TOKENS, CHANNELS)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs((many[:-1] * many[1:]).mean()) < 0.01


def controlnet(flux: FrozenFlux) -> LatentControlNet:
    """A ControlNet with nonzero residuals and statistics that differ from those of its input."""
    shape = ControlNetConfig.of(flux.folder.transformer, WIDTH, 4, 8, double=1, single=1)
    network = LatentControlNet(shape).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        parameter.normal_(std=0.2, generator=draw)
    return network


def test_the_controlnet_corrects_every_step(flux: FrozenFlux) -> None:
    network, text = controlnet(flux), text_of(flux, PROMPTS)
    noise, condition = draw_noise([1, 2], TOKENS, CHANNELS), torch.randn(2, 16, WIDTH)
    found = sampled(flux, noise, Sampling(2, conditioning_scale=0.7), network, condition)
    x, (first, second, last) = noise, noise_levels(flux.folder, TOKENS, 2)
    ids = image_ids(SIDE, SIDE), torch.zeros(text.states.shape[1], 3)
    for now, then in ((first, second), (second, last)):
        rest = (*text, torch.full((2,), now), torch.full((2,), 3.5), *ids)
        residuals = network(x, condition, *rest)
        scaled = type(residuals)(*(tuple(0.7 * r for r in part) for part in residuals))
        with torch.no_grad():
            x = x + (then - now) * velocity(flux.transformer, x, scaled, *rest)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=0)
    plain = sampled(flux, noise, Sampling(2))
    torch.testing.assert_close(sampled(flux, noise, Sampling(2, conditioning_scale=0.0), network, condition), plain)
    assert (found - plain).abs().mean() > 0.05


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_an_image_is_independent_of_its_batch(flux: FrozenFlux, cfg: float) -> None:
    network, condition = controlnet(flux), torch.randn(2, 16, WIDTH)
    settings, empty = Sampling(4, cfg=cfg), text_of(flux, [""])
    both = sample(
        flux, text_of(flux, PROMPTS), draw_noise([1, 2], TOKENS, CHANNELS), settings, network, condition, empty
    )
    alone = sample(
        flux, text_of(flux, PROMPTS[1:]), draw_noise([2], TOKENS, CHANNELS), settings, network, condition[1:], empty
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(RunError, match=r"^0 FLUX steps: set a whole number of 1 or more$"):
        Sampling(0)
