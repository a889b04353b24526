"""Previews during training: a fixed set of images every `previews.every` steps, from the current weights.

All ranks run the trained modules, because the weights are sharded; rank 0 writes the file. Training is not affected: no
random state is used, and no BatchNorm statistics are updated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ...data import Dataset, stacked
from ...data.transforms import decode_sizes
from ...recipes.schema import Previews
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator, load_flux
from ..inference.latent_decoder import LatentDecoder, usual_device
from ..inference.settings import Settings
from ..inference.stored_controlnet import load_controlnet
from ..io import write_png
from ..models.prompt import PromptTemplate
from ..monitors.phase_timer import PhaseTimer
from ..monitors.renames import PREVIEWS
from ..optim.engine import Engine
from ..optim.train_state import TrainState
from ..stages import Stage
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage

log = logging.getLogger(__name__)

Rows = dict[str, list[Image.Image]]


def sampler(
    settings: Previews,
    every: int,
    stage: Stage,
    engine: Engine,
    dataset: Dataset,
    ranks: Ranks,
    folder: Path,
    phase: PhaseTimer,
) -> Callable[[TrainState], None]:
    """A function to call after each step: it writes `previews/step-NNNNNNNN.png` every `every` steps."""
    if isinstance(stage, ControlNetStage):
        captions, draw = _reconstructions(settings.count, stage, engine, dataset, ranks)
    else:
        captions, draw = _generations(settings, cast(PatchLatentStage, stage), engine, dataset, ranks)

    def after_step(progress: TrainState) -> None:
        if progress.step % every == 0:
            with phase("previews"):
                write(engine.undisturbed(draw), progress.step)

    def write(rows: Rows, step: int) -> None:
        if ranks.first and rows:
            try:
                (folder / PREVIEWS).mkdir(exist_ok=True)
                write_png(folder / PREVIEWS / f"step-{step:08d}.png", make_contact_sheet(rows, captions))
            except OSError as error:  # a preview is not worth the run
                log.error("the preview of step %d was not written: %s", step, error)

    return after_step


def _reconstructions(
    count: int, stage: ControlNetStage, engine: Engine, dataset: Dataset, ranks: Ranks
) -> tuple[list[str], Callable[[], Rows]]:
    """Stage 2: the first images of the data, generated from their own latents."""
    captions, images, originals, _ = _first(dataset, count, stage.image_sizes)
    model: Any = engine.model
    generator = Generator.without_branch(
        model,
        stage.data.image_size,
        ranks.device,
        flux=model.flux,
        controlnet=model.controlnet,
        tokenizers=stage.folder.tokenizers,
        flux_size=stage.flux.image_size,
    )

    def draw() -> Rows:
        made = generator.generate(captions, range(len(captions)), Settings(), generator.encode(images))
        return {"original": [Image.fromarray(p) for p in originals], "its latents": made}

    return captions, draw


def _generations(
    settings: Previews, stage: PatchLatentStage, engine: Engine, dataset: Dataset, ranks: Ranks
) -> tuple[list[str], Callable[[], Rows]]:
    """Stage 1: images for the first captions of the data, by a trained ControlNet on rank 0."""
    captions, _, images, sources = _first(dataset, settings.count, stage.image_sizes)
    model: Any = engine.model
    width, side = stage.config.text_config.hidden_size, math.isqrt(stage.tokens_per_image)
    assert settings.controlnet and stage.tokenizer, "the recipe's schema asks for it"
    template = PromptTemplate(stage.tokenizer, stage.branch.max_text_tokens)
    decoder = LatentDecoder(model, template, stage.image_sizes[0], ranks.device, edits=stage.edits)
    image_generator = _ImageGenerator(settings, width, side, ranks.device) if ranks.first else None

    def draw() -> Rows:
        latents = decoder.latents(captions, range(len(captions)), Settings(), sources)
        if image_generator is None:
            return {}
        try:
            made = image_generator.generate(decoder, captions, latents.float())
        except (RunError, OSError, torch.OutOfMemoryError) as error:  # the other ranks continue, so this one must too
            log.error("the preview images were not generated: %s", error)
            return {}
        return {"original": [Image.fromarray(image) for image in images], "generated": made}

    return captions, draw


class _ImageGenerator:
    """Generates images from latents on rank 0 of a run. Between previews the ControlNet is in host memory and FLUX
    only in its files.

    A preview loads both onto the device and frees them afterwards, so that a step has the memory planned for it.
    """

    def __init__(self, settings: Previews, width: int, side: int, device: torch.device) -> None:
        """Opens and checks everything before the run begins."""
        assert settings.controlnet
        self.device, self.dtype = usual_device(device, None)
        where = Path(settings.controlnet), settings.flux, width, side, torch.device("cpu"), self.dtype
        found = load_controlnet(*where)
        self.folder, self.size = found.folder, found.size
        self.controlnet: Any = found.network  # diffusers' wrapped `to` has an annotation that no call fits
        self.folder.require_weights()

    def generate(self, decoder: LatentDecoder, captions: list[str], latents: torch.Tensor) -> list[Image.Image]:
        """Images of patch latents [B, N, D]."""
        try:
            flux = load_flux(self.folder, self.device, self.dtype)
            network, tokenizers = self.controlnet.to(self.device), self.folder.tokenizers
            flux_parts = {"flux": flux, "controlnet": network, "tokenizers": tokenizers, "flux_size": self.size}
            whole = Generator(**vars(decoder), **flux_parts)
            return whole.generate(captions, range(len(captions)), Settings(), latents)
        finally:
            flux = whole = None
            self.controlnet.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _first(
    dataset: Dataset, count: int, sizes: tuple[int, ...]
) -> tuple[list[str], torch.Tensor, list[np.ndarray], list[torch.Tensor | None]]:
    """Captions of the first samples, their images as uint8 [count, 3, S, S], and as arrays at the last size; the source
    images [3, S, S] of editing pairs."""
    captions, decoded, sources = [], [], []
    for shard, samples in enumerate(dataset.samples_per_shard):
        for sample in range(samples):
            if len(captions) == count:
                break
            with suppress(ValueError):  # unreadable: reported when training reads it
                raw = dataset.read(shard, sample, 0, len(captions))
                image, source = decode_sizes(raw.image, sizes), None
                if raw.source_image is not None:
                    source = stacked(decode_sizes(raw.source_image, sizes[:1]))[0]
                decoded.append(image)
                captions.append(raw.caption)
                sources.append(source)
    return captions, stacked([images[0] for images in decoded]), [images[-1] for images in decoded], sources
