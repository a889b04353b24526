"""Names and shapes of all parameters of a recipe's model, as the built model names them."""

from __future__ import annotations

from typing import NamedTuple

from ..models.flux_config import PARTS
from . import flux_shapes, shapes
from .opened import LatentControl, PatchLatents
from .shapes import Weights, within


class Parameters(NamedTuple):
    """Name -> shape, in the model's order."""

    trained: dict[str, tuple[int, ...]]
    frozen: dict[str, tuple[int, ...]]


def named_parameters(model: PatchLatents | LatentControl) -> Parameters:
    """The parameters of a recipe's model with every frozen part in it."""
    trained, frozen = _patch_latents(model) if isinstance(model, PatchLatents) else _latent_control(model)
    return Parameters(
        {weight.name: weight.shape for weight in trained}, {weight.name: weight.shape for weight in frozen}
    )


def _patch_latents(model: PatchLatents) -> tuple[Weights, Weights]:
    text, (side, _) = model.config.text_config, model.square.latents

    def trained() -> Weights:
        yield from within("branch", shapes.branch(text, side, model.branch))
        yield from within("head", shapes.head(text.hidden_size, model.branch))

    def frozen() -> Weights:
        yield from within("backbone.text", shapes.text_model(text, model.backbone.weights))
        if model.branch.targets == "native":
            yield from within("backbone.vision", shapes.vision_encoder(model.config.vision_config))
        if model.encoder:
            yield from within("targets.encoder.vision", shapes.vision_encoder(model.encoder.vision_config))
        if model.vae:
            yield from within("targets.encoder.vae", flux_shapes.flux_part(model.vae, "vae"))

    return trained(), frozen()


def _latent_control(model: LatentControl) -> tuple[Weights, Weights]:
    def frozen() -> Weights:
        yield from within("backbone.vision", shapes.vision_encoder(model.config.vision_config))
        for part in PARTS:
            yield from within(f"flux.{part}", flux_shapes.flux_part(model.folder, part))

    return within("controlnet", flux_shapes.bridge(model.shape)), frozen()
