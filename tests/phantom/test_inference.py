"""Decoding, sampling, encoding and saving on the phantom GPU: no tensor on the wrong device, no unplanned wait."""

from __future__ import annotations

from typing import Any

import pytest

import phantoms


def waits(mode: Any) -> dict[str, dict[str, int]]:
    return {"reads": dict(mode.reads), "copies": dict(mode.copies)}


def decode_and_sample(name: str, control: str, guidance: float) -> dict[str, Any]:
    """Prompts to images, through the models of two recipes."""
    import torch

    from bifrost.kernels import PrefixLayout
    from bifrost.recipes import load_recipe
    from bifrost.trainer.inference import flux_sampler
    from bifrost.trainer.inference.flux_sampler import Text, draw_noise, sample
    from bifrost.trainer.inference.masked_decoding import decode, draw_orders, reveal_counts
    from bifrost.trainer.inference.settings import Sampling
    from bifrost.trainer.models.flux import FrozenFlux, Tokens
    from bifrost.trainer.models.latent_controlnet import LatentControlNet
    from bifrost.trainer.phantom.mode import Phantom
    from bifrost.trainer.phantom.recipe import DEVICE, empty, open_placed
    from bifrost.trainer.stages.unsharded import init_context

    flux_sampler.noise_levels = lambda folder, tokens, steps: [1 - i / steps for i in range(steps + 1)]
    samples, prompts = 2, 2 if guidance == 1 else 4
    mode: Any = Phantom()
    with mode, torch.no_grad():
        one: Any = open_placed(load_recipe(name), placed=False)
        two: Any = open_placed(load_recipe(control), placed=False)
        with init_context(DEVICE, torch.bfloat16):
            mllm = one.build().eval()
            flux, network = FrozenFlux(two.folder), LatentControlNet(two.shape).eval()
        mllm.build_rest()
        patches = one.tokens_per_image
        ids = torch.zeros(20 * prompts, dtype=torch.int64).to(DEVICE)
        prefix = mllm.backbone.prefix(ids, PrefixLayout.of((20,) * prompts, patches, DEVICE))
        orders = draw_orders(range(samples), patches).to(DEVICE)
        mode.copies.clear()  # the prompts and orders
        latents = decode(mllm.branch, mllm.head, prefix, orders, reveal_counts(patches, 4), guidance)
        lengths = two.folder.text_lengths
        states = flux.encode_text(Tokens(*(empty(samples, n, dtype=torch.int64) for n in lengths)))
        nothing = Text(states[0][:1], states[1][:1])
        tokens, channels = two.folder.grid(two.flux.image_size) ** 2, two.folder.transformer["in_channels"]
        noise = draw_noise(range(samples), tokens, channels).to(DEVICE, non_blocking=True)
        found = sample(flux, Text(*states), noise, Sampling(steps=2, cfg=guidance), network, latents, nothing)
        images = flux.decode_latents(found)
    return {**waits(mode), "latents": list(latents.shape), "images": [*images.shape, str(images.device)]}


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.real_size), 3.0])
def test_generation_stays_on_the_device(guidance: float) -> None:
    found = phantoms.run(decode_and_sample, "tiny-mllm", "tiny-controlnet", guidance)
    assert found == {"reads": {}, "copies": {}, "latents": [2, 16, 192], "images": [2, 3, 64, 64, "cuda:0"]}


@pytest.mark.real_size
def test_generation_stays_on_the_device_at_real_size() -> None:
    found = phantoms.run(decode_and_sample, "mllm-7b", "flux-controlnet", 3.0)
    assert found == {"reads": {}, "copies": {}, "latents": [2, 256, 3584], "images": [2, 3, 512, 512, "cuda:0"]}


def encode(name: str) -> dict[str, Any]:
    """What `bifrost data encode` computes for a stage-2 recipe."""
    import torch

    from bifrost.recipes import load_recipe
    from bifrost.trainer.models.flux import Tokens
    from bifrost.trainer.phantom.mode import Phantom
    from bifrost.trainer.phantom.recipe import DEVICE, empty, open_placed
    from bifrost.trainer.stages.unsharded import init_context

    mode: Any = Phantom()
    with mode:
        stage: Any = open_placed(load_recipe(name), placed=False)
        with init_context(DEVICE, torch.bfloat16):
            model = stage.build().eval()
        model.build_rest()
        images, flux_images = (
            empty(2, 3, side, side, dtype=torch.uint8) for side in (stage.data.image_size, stage.flux.image_size)
        )
        model.backbone.patch_latents(images)  # its tables are made once
        mode.copies.clear()
        latents = model.backbone.patch_latents(images)
        mean, std = model.flux.posterior(flux_images)
        text = model.flux.encode_text(Tokens(*(empty(2, n, dtype=torch.int64) for n in stage.folder.text_lengths)))
    return {**waits(mode), "on": sorted({f"{x.device} {x.dtype}" for x in (latents, mean, std, *text)})}


@pytest.mark.parametrize("name", ["tiny-controlnet", pytest.param("flux-controlnet", marks=pytest.mark.real_size)])
def test_encoding_stays_on_the_device(name: str) -> None:
    assert phantoms.run(encode, name) == {"reads": {}, "copies": {}, "on": ["cuda:0 torch.bfloat16"]}
