"""Bridges without a ControlNet against attention written out here, and what FLUX gets of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_flux
from bifrost.recipes.stage2 import Connector, ControlNet
from bifrost.trainer.errors import RunError
from bifrost.trainer.inference.flux_sampler import Text, draw_noise, sample
from bifrost.trainer.inference.settings import Sampling
from bifrost.trainer.models.flux import FluxFolder, FrozenFlux, image_ids, velocity
from bifrost.trainer.models.text_bridge import TextBridge, build_bridge
from bifrost.trainer.models.text_bridge_config import bridge_config

WIDTH, GRID, GRID_OUT, TEXT, QUERIES = 10, 2, 4, 12, 3
LATENTS = torch.randn(2, GRID**2, WIDTH, generator=torch.Generator().manual_seed(0))
CONNECTOR = Connector(queries=QUERIES, layers=2, width=128)
SETTINGS = {
    "queries": ControlNet(bridge="queries", connector=CONNECTOR),
    "cross_attention": ControlNet(bridge="cross_attention"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> FrozenFlux:
    made = tiny_flux.pipeline()
    with torch.no_grad():  # text is to show in the velocity
        made.transformer.context_embedder.weight.mul_(20)
    model = FrozenFlux(FluxFolder.open(tiny_flux.save(made, tmp_path_factory.mktemp("flux"))))
    model.load()
    return model


def bridge(flux: FrozenFlux, kind: str, seed: int = 0) -> TextBridge:
    made = build_bridge(bridge_config(SETTINGS[kind], flux.folder.transformer, WIDTH, GRID, GRID_OUT))
    assert isinstance(made, TextBridge)
    made.initialise(flux.folder.files("transformer"), "", seed)
    return made.requires_grad_(False)


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_queries_attend_to_latents_and_to_each_other(flux: FrozenFlux) -> None:
    made: Any = bridge(flux, "queries")
    w = dict(made.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for sample_latents, found in zip(LATENTS, made(LATENTS), strict=True):
        places = normed(linear("latents", sample_latents) + w["positions"][0])
        rows = w["queries"][0]
        for block in ("blocks.0", "blocks.1"):
            inner = normed(rows)
            around = torch.cat((places, inner))
            heads = []
            for head in (slice(0, 64), slice(64, 128)):
                query, key, value = (
                    linear(f"{block}.to_{name}", x)[:, head] for name, x in (("q", inner), ("k", around), ("v", around))
                )
                heads.append((query @ key.T / 8).softmax(-1) @ value)
            rows = rows + linear(f"{block}.to_out", torch.cat(heads, dim=1))
            hidden = torch.nn.functional.gelu(linear(f"{block}.up", normed(rows)), approximate="tanh")
            rows = rows + linear(f"{block}.down", hidden)
        torch.testing.assert_close(found, linear("project", normed(rows)), rtol=1e-4, atol=1e-5)
    assert made(LATENTS).shape == (2, QUERIES, TEXT) and not made.ids(LATENTS.device).any()
    assert not torch.allclose(made(LATENTS.flip(1)), made(LATENTS), atol=1e-3), "the places of latents count"


def test_projected_latents_are_at_the_middles_of_their_patches(flux: FrozenFlux) -> None:
    made: Any = bridge(flux, "cross_attention")
    wanted = torch.einsum("bnd,ed->bne", LATENTS, made.project.weight) + made.project.bias
    torch.testing.assert_close(made(LATENTS), wanted)
    # A patch covers 2 x 2 image tokens, of rows 0 and 1, or 2 and 3.
    assert made.ids(LATENTS.device).tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]


@pytest.mark.parametrize("kind", SETTINGS)
def test_tokens_of_a_sample_join_the_text_of_each_of_its_draws(flux: FrozenFlux, kind: str) -> None:
    made = bridge(flux, kind)
    text, ids = torch.randn(4, 5, TEXT), torch.zeros(5, 3)
    given = {"text": text, "txt_ids": ids, "pooled": torch.zeros(4, 8)}
    joined = made.join(given, LATENTS)
    assert given["text"] is text and torch.equal(joined["text"][:, :5], text) and joined["pooled"] is given["pooled"]
    for row, sample_number in enumerate((0, 0, 1, 1)):
        assert torch.equal(joined["text"][row, 5:], made(LATENTS)[sample_number])
    assert torch.equal(joined["txt_ids"], torch.cat((ids, made.ids(ids.device))))


@pytest.mark.parametrize("kind", SETTINGS)
def test_weights_depend_on_the_seed_alone(flux: FrozenFlux, kind: str) -> None:
    one, same, other = (dict(bridge(flux, kind, seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    assert all(float(parameter.std()) > 0 for parameter in one.values())


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_sampling_follows_the_velocity_with_the_tokens(flux: FrozenFlux, kind: str, cfg: float) -> None:
    made, noise = bridge(flux, kind), draw_noise([3, 4], GRID_OUT**2, 16)
    text, empty = (Text(torch.randn(n, 5, TEXT), torch.randn(n, 8)) for n in (2, 1))
    settings = Sampling(1, conditioning_scale=0.3, cfg=cfg)
    found = sample(flux, text, noise, settings, made, LATENTS, empty)

    def at_noise(each: Text) -> Tensor:
        states = each.states.expand(2, -1, -1)
        rest = made.join({"text": states, "txt_ids": torch.zeros(5, 3)}, LATENTS)
        given = {"pooled": each.pooled.expand(2, -1), "timestep": torch.ones(2), "guidance": torch.full((2,), 3.5)}
        with torch.no_grad():
            return velocity(flux.transformer, noise, None, **rest, **given, img_ids=image_ids(8, 8))

    step = at_noise(text) if cfg == 1 else at_noise(empty) + cfg * (at_noise(text) - at_noise(empty))
    packed = torch.nn.functional.pixel_unshuffle(found, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(packed, noise - step, rtol=1e-4, atol=1e-4)
    alone = sample(flux, text, noise, settings, None, None, empty)
    assert (found - alone).abs().max() > 1e-3, "the latents change the image"


def test_other_latents_or_another_flux_are_refused(flux: FrozenFlux) -> None:
    shape = bridge(flux, "queries").shape
    shape.require(flux.folder.transformer, WIDTH, GRID, GRID_OUT)
    for given in ((WIDTH + 1, GRID, GRID_OUT), (WIDTH, GRID + 1, GRID_OUT), (WIDTH, GRID, GRID_OUT + 1)):
        with pytest.raises(
            RunError, match="the bridge expects 2 x 2 patch latents of width 10, text tokens of width 12"
        ):
            shape.require(flux.folder.transformer, *given)
