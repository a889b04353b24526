"""Previews during training: a fixed set of images every `previews.every` steps, from the current weights.

All ranks run the trained modules, because the weights are sharded; rank 0 writes the file. Training is not affected: no
random state is used, and no BatchNorm statistics are updated.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from ...data import Dataset, stacked
from ...data.bucket_rule import Bucket, BucketRule
from ...data.transforms import decode_shapes
from ...recipes.schema import Previews
from ..distributed.process_group import Ranks
from ..errors import RunError
from ..inference.contact_sheet import make_contact_sheet
from ..inference.generator import Generator, load_flux
from ..inference.image_shapes import buckets_of, square
from ..inference.latent_decoder import LatentDecoder, usual_device
from ..inference.mllm import decode_prompts
from ..inference.settings import Settings
from ..inference.stored_controlnet import load_controlnet
from ..io import write_png
from ..models.image_grids import patch_grid
from ..models.prompt import PromptTemplate
from ..monitors.phase_timer import PhaseTimer
from ..monitors.renames import PREVIEWS
from ..optim.engine import Engine
from ..optim.train_state import TrainState
from ..stages import Stage
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage

log = logging.getLogger(__name__)

T = TypeVar("T")
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


class _Sample(NamedTuple):
    """A sample of the data of which an image is generated."""

    caption: str
    bucket: Bucket
    images: list[np.ndarray]
    """Its image, uint8 [H, W, 3], in every shape of its bucket: for the vision encoder and for FLUX."""
    source: torch.Tensor | None
    """The source image of an editing pair, uint8 [3, H, W], in the first of these shapes."""


def _reconstructions(
    count: int, stage: ControlNetStage, engine: Engine, dataset: Dataset, ranks: Ranks
) -> tuple[list[str], Callable[[], Rows]]:
    """Stage 2: the first images of the data, generated from their own latents, in the shapes of their buckets."""
    model: Any = engine.model
    generator = Generator.without_branch(
        model,
        stage.data.image_size,
        ranks.device,
        flux=model.flux,
        controlnet=model.controlnet,
        tokenizers=stage.folder.tokenizers,
        flux_size=stage.flux.image_size,
        rule=stage.bucket_rule,
    )
    samples = _first(dataset, count, lambda image: generator.bucket(generator.shape_of(image)))

    def made(bucket: Bucket, places: list[int]) -> list[Image.Image]:
        part = [samples[place] for place in places]
        latents = generator.encode(stacked([sample.images[0] for sample in part]))
        return generator.generate([sample.caption for sample in part], places, _settings(generator, bucket), latents)

    def draw() -> Rows:
        originals = [Image.fromarray(sample.images[-1]) for sample in samples]
        return {"original": originals, "its latents": _by_bucket(samples, made)}

    return [sample.caption for sample in samples], draw


def _generations(
    settings: Previews, stage: PatchLatentStage, engine: Engine, dataset: Dataset, ranks: Ranks
) -> tuple[list[str], Callable[[], Rows]]:
    """Stage 1: images for the first captions of the data, by a trained ControlNet on rank 0; in the shapes of their
    images' buckets, as far as the ControlNet was trained in these."""
    model: Any = engine.model
    width, side = stage.config.text_config.hidden_size, math.isqrt(stage.tokens_per_image)
    assert settings.controlnet and stage.tokenizer, "the recipe's schema asks for it"
    template = PromptTemplate(stage.tokenizer, stage.branch.max_text_tokens)
    decoder = LatentDecoder(model, template, stage.image_sizes[0], ranks.device, edits=stage.edits)
    image_generator = _ImageGenerator(settings, width, side, ranks.device) if ranks.first else None
    alone, known = ranks.broadcast(image_generator and image_generator.buckets(stage.image_sizes[0]))
    samples = _first(dataset, settings.count, lambda image: _shared(stage.bucket_rule, image, known) or alone)
    own, shared = stage.bucket_rule.buckets if stage.bucket_rule else (), [bucket.shapes[0] for bucket in known]
    if ranks.first and (missing := [str(bucket) for bucket in own if bucket.largest not in shared]):
        log.warning("previews: the ControlNet was not trained in %s: squares in place of these", ", ".join(missing))

    def latents(bucket: Bucket, places: list[int]) -> list[torch.Tensor]:
        part = [samples[place] for place in places]
        grid = patch_grid(bucket.shapes[0], stage.image_size, side)
        steps = Settings(min(Settings().steps, math.prod(grid)))
        captions, sources = [sample.caption for sample in part], [sample.source for sample in part]
        return list(decode_prompts(model, template, captions, places, steps, grid, sources))

    def draw() -> Rows:
        decoded = _by_bucket(samples, latents)
        if image_generator is None:
            return {}
        try:
            made = image_generator.generate(decoder, samples, decoded)
        except (RunError, OSError, torch.OutOfMemoryError) as error:  # the other ranks continue, so this one must too
            log.error("the preview images were not generated: %s", error)
            return {}
        return {"original": [Image.fromarray(sample.images[0]) for sample in samples], "generated": made}

    return [sample.caption for sample in samples], draw


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
        self.folder, self.size, self.rule = found.folder, found.size, found.rule
        self.controlnet: Any = found.network  # diffusers' wrapped `to` has an annotation that no call fits
        self.folder.require_weights()

    def buckets(self, image_size: int) -> tuple[Bucket, tuple[Bucket, ...]]:
        """The square of `image_size` pixels for the vision encoder, and the buckets that the ControlNet was trained
        in."""
        alone = square(image_size, self.size)
        return alone, buckets_of(self.rule, alone)

    def generate(
        self, decoder: LatentDecoder, samples: Sequence[_Sample], latents: Sequence[torch.Tensor]
    ) -> list[Image.Image]:
        """Images of the samples' patch latents [N, D]."""
        try:
            flux = load_flux(self.folder, self.device, self.dtype)
            network, tokenizers = self.controlnet.to(self.device), self.folder.tokenizers
            flux_parts = {"flux": flux, "controlnet": network, "tokenizers": tokenizers, "flux_size": self.size}
            whole = Generator(**vars(decoder), **flux_parts, rule=self.rule)
            return _by_bucket(samples, partial(_generated, whole, samples, latents))
        finally:
            flux = whole = None
            self.controlnet.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _generated(
    generator: Generator,
    samples: Sequence[_Sample],
    latents: Sequence[torch.Tensor],
    bucket: Bucket,
    places: list[int],
) -> list[Image.Image]:
    captions = [samples[place].caption for place in places]
    given = torch.stack([latents[place] for place in places]).float()
    return generator.generate(captions, places, _settings(generator, bucket), given)


def _settings(generator: Generator, bucket: Bucket) -> Settings:
    """Those of images in the shape of `bucket`, which may be the square of a ControlNet that was not trained in it."""
    return Settings(shape=None if bucket == generator.bucket(None) else str(bucket))


def _shared(rule: BucketRule | None, image: bytes, known: Sequence[Bucket]) -> Bucket | None:
    """The bucket of stage 2 with the shape of an image file's bucket of stage 1; None if there is none."""
    if rule is None:
        return None
    shape = rule.nearest(image).largest
    return next((bucket for bucket in known if bucket.shapes[0] == shape), None)


def _by_bucket(samples: Sequence[_Sample], make: Callable[[Bucket, list[int]], Sequence[T]]) -> list[T]:
    """What `make` returns for the samples of each bucket, given by their numbers, in the order of all samples."""
    found: dict[int, T] = {}
    for bucket in dict.fromkeys(sample.bucket for sample in samples):
        places = [place for place, sample in enumerate(samples) if sample.bucket == bucket]
        found.update(zip(places, make(bucket, places), strict=True))
    return [found[place] for place in range(len(samples))]


def _first(dataset: Dataset, count: int, bucket_of: Callable[[bytes], Bucket]) -> list[_Sample]:
    """The first readable samples. bucket_of: the bucket of an image file, which raises ValueError if it does not
    decode."""
    found: list[_Sample] = []
    for shard, samples in enumerate(dataset.samples_per_shard):
        for sample in range(samples):
            if len(found) == count:
                break
            with suppress(ValueError):  # unreadable: reported when training reads it
                raw = dataset.read(shard, sample, 0, len(found))
                bucket, source = bucket_of(raw.image), None
                images = decode_shapes(raw.image, bucket.shapes)
                if raw.source_image is not None:
                    source = stacked(decode_shapes(raw.source_image, bucket.shapes[:1]))[0]
                found.append(_Sample(raw.caption, bucket, images, source))
    return found
