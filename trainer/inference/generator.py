"""Image generation from prompts through both stages; the models are loaded once.

Legend: B images, N patch latents of width D, S and P image sides in pixels for the vision encoder and for FLUX.
"""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from ...data import stacked
from ...data.bucket_rule import Bucket, BucketRule, Shape
from ...data.transforms import decode_shapes
from ...slurm.run_folder import no_run
from ..distributed.process_group import Group
from ..errors import RunError
from ..models.flux import FluxFolder, FluxTokenizers, FrozenFlux, Tokens
from ..models.hub import locate
from ..models.prompt import PromptTemplate
from ..models.text_bridge import Bridge
from ..stages import open_controlnet
from ..stages.unsharded import init_context
from ..stages.vision_outputs import load_vision_encoder
from .flux_sampler import OnStep, Text, draw_noise, sample
from .image_shapes import buckets_of, known_to_both, square
from .latent_decoder import LatentDecoder, open_run, read_decoder, require_native, usual_device
from .settings import Settings
from .stored_controlnet import load_controlnet
from .stored_runs import RECIPE, has_recipe, run_and_step, stored_recipe

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Generator(LatentDecoder):
    """Both stages on one device. `load` reads them from runs; a training loop can pass its own modules."""

    flux: FrozenFlux
    controlnet: Bridge
    tokenizers: FluxTokenizers
    flux_size: int
    """P, side in pixels of the generated images."""
    rule: BucketRule | None = None
    """Of the aspect-ratio buckets that the ControlNet was trained in."""

    @classmethod
    def load(
        cls,
        mllm: str | Path,
        controlnet: str | Path,
        flux: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = Group(),
    ) -> Generator:
        """mllm: a run folder or an export of one. controlnet, flux: see `load_controlnet`.

        EMA weights are used if the run has them. Default: a GPU with bf16, else CPU with fp32. RunError names what
        cannot be used.
        """
        device, dtype = usual_device(device, dtype)
        stage = open_run(Path(mllm))
        require_native(stage, Path(mllm))
        # The smaller model first: a mismatch is found before the large ones are read.
        width, side = stage.config.text_config.hidden_size, math.isqrt(stage.tokens_per_image)
        parts = load_image_generator(Path(controlnet), flux, width, side, device, dtype)
        decoder = read_decoder(Path(mllm), stage, device, dtype, group)
        return cls(**vars(decoder), **parts)

    @classmethod
    def without_branch(
        cls, vision: Any, image_size: int, device: torch.device, group: Group = Group(), **parts: Any
    ) -> Generator:
        """Stage 2 alone, which encodes images and generates from given latents, and decodes no prompts.

        vision: with the vision encoder's `patch_latents`. image_size: S. parts: the fields of this class.
        """
        return cls(vision, cast(PromptTemplate, None), image_size, device, group, **parts)

    @classmethod
    def load_without_branch(
        cls,
        controlnet: Path,
        flux: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = Group(),
    ) -> Generator:
        """`without_branch` of a stage-2 run, which names its vision encoder; otherwise as `load`."""
        if not has_recipe(controlnet):
            raise RunError(f"{controlnet}: only a run names the vision encoder of its latents; give --mllm RUN, too")
        device, dtype = usual_device(device, dtype)
        stage = open_controlnet(stored_recipe(controlnet, "controlnet"))
        patches, width = stage.condition
        where = width, math.isqrt(patches), device, dtype
        parts = load_image_generator(controlnet, flux, *where)
        vision = load_vision_encoder(stage.config, stage.backbone_files(), device, dtype)
        return cls.without_branch(vision, stage.data.image_size, device, group, **parts)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = Settings(),
        latents: Tensor | None = None,
        batch: int = 8,
        made: Callable[[int], None] = lambda count: None,
        sources: Sequence[Tensor | None] | None = None,
    ) -> list[Image.Image]:
        """An image per prompt and seed, independent of the rest of the batch.

        latents [B, N, D]: used instead of decoded ones. made: called with the number of images of each batch. sources:
        see `latents`.
        """
        assert len(prompts) == len(seeds)

        def work(part: slice) -> list[Image.Image]:
            given = latents[part] if latents is not None else None
            if given is None and settings.controlnet:
                shown = sources[part] if sources is not None else None
                given = self.latents(prompts[part], seeds[part], settings, shown)
            return to_images(self.render(prompts[part], seeds[part], settings, given))

        return self.in_batches(len(prompts), batch, work, made)

    def bucket(self, shape: str | None) -> Bucket:
        """The bucket of a shape of `Settings`; None: a square. RunError unless the ControlNet was trained in it."""
        alone = square(self.image_size, self.flux_size)
        if shape is None:
            return alone
        known = {str(bucket): bucket for bucket in buckets_of(self.rule, alone)}
        if shape not in known:
            raise RunError(f"shape {shape}: the ControlNet was trained in {', '.join(known)}; give one of these")
        return known[shape]

    def shape_of(self, image: bytes) -> str | None:
        """The shape of an image file's bucket, however small the image is; None: a square, without buckets."""
        return str(self.rule.nearest(image)) if self.rule else None

    def encode_file(self, image: bytes, settings: Settings) -> Tensor:
        """`encode` of an image file in the shape of `settings`, [1, N, D]."""
        return self.encode(stacked(decode_shapes(image, [self.pixels(settings)])))

    def pixels(self, settings: Settings) -> Shape:
        return self.bucket(settings.shape).shapes[0]

    def check(self, settings: Settings, with_source: bool = False) -> None:
        """As of a decoder, and RunError for a shape in which one of the stages was not trained."""
        self.require_shape(settings.shape)
        super().check(settings, with_source)

    def require_shape(self, shape: str | None) -> None:
        """RunError unless both stages were trained in a shape of `Settings`."""
        alone = self.bucket(None)
        asked = str(alone) if shape is None else shape
        both = known_to_both(buckets_of(self.rule, alone), self.shapes or alone.shapes[:1])
        if asked not in both:
            hint = (
                f"give shape {' or '.join(both)}"
                if both
                else "they have none in common; train both in the same buckets"
            )
            raise RunError(f"shape {asked}: the two stages were not both trained in it (data.buckets); {hint}")

    def warn_about_truncation(
        self, prompts: Sequence[str], settings: Settings, decoded: bool = True, with_source: bool = False
    ) -> None:
        """Warn of each prompt beyond the limit of a text model, with the tokens read and dropped: its end is ignored,
        as in training. decoded: whether the patch latents are decoded from the prompt; with_source: with a source
        image."""
        for prompt in dict.fromkeys(prompts):
            limits = {} if settings.empty_prompt else self.tokenizers.limits(prompt)
            if settings.controlnet and decoded:
                limits["the branch's text model"] = (
                    self.template.count_tokens(prompt, int(with_source)),
                    self.template.max_tokens,
                )
            cut = [f"{name} reads {m} of {n} tokens ({n - m} dropped)" for name, (n, m) in limits.items() if n > m]
            if cut:
                log.warning("prompt %s is cut at its end: %s", textwrap.shorten(repr(prompt), 60), ", ".join(cut))

    @torch.no_grad()
    def render(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        latents: Tensor | None,
    ) -> Tensor:
        """uint8 images [B, 3, P, P], or of another shape of `settings`, from patch latents [B, N, D] and prompts, as
        one batch."""
        return self.flux.decode_latents(self.sample(prompts, seeds, settings, latents))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        latents: Tensor | None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The images of `render` before the VAE decodes them: FLUX latents [B, c, h, w], fp32."""
        texts = [""] * len(prompts) if settings.empty_prompt else prompts
        folder = self.flux.folder
        rows, columns = (folder.grid(side) for side in self.bucket(settings.shape).shapes[-1])
        noise = draw_noise(seeds, rows * columns, folder.transformer["in_channels"]).unflatten(1, (rows, columns))
        return sample(
            self.flux,
            self._text(texts),
            noise.to(self.device),
            settings.flux,
            self.controlnet if settings.controlnet else None,
            latents if settings.controlnet else None,
            self._text([""]) if settings.flux.cfg != 1 else None,
            on_step,
        )

    def _text(self, prompts: Sequence[str]) -> Text:
        tokens = self.tokenizers(prompts)
        return Text(*self.flux.encode_text(Tokens(tokens.t5.to(self.device), tokens.clip.to(self.device))))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """RGB images of uint8 pixels [B, 3, H, W]."""
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def load_image_generator(
    path: Path, flux: str | None, width: int, side: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What a `Generator` has besides a decoder, for patch latents [B, side^2, width]; by the names of its fields."""
    found = load_controlnet(path, flux, width, side, device, dtype)
    return {
        "flux": load_flux(found.folder, device, dtype),
        "controlnet": found.network,
        "tokenizers": found.folder.tokenizers,
        "flux_size": found.size,
        "rule": found.rule,
    }


def load_flux(folder: FluxFolder, device: torch.device, dtype: torch.dtype) -> FrozenFlux:
    """All parts of a FLUX on `device`."""
    with init_context(device, dtype):
        frozen = FrozenFlux(folder)
    frozen.load()
    return frozen


def base_folder(path: Path) -> Path:
    """The folder of the MLLM that the stage-1 run, or export of one, at `path` was trained from."""
    backbone = stored_recipe(path, "patch-latents").backbone
    return locate(backbone.path, backbone.revision)


def origin(path: Path) -> str:
    """An identifier of the weights at `path`: the resolved path of the run or export, and the step of a run."""
    if not path.is_dir():
        raise RunError(no_run(path, RECIPE))
    run, step = run_and_step(path)
    return f"{run}{f' step {step}' if step else ''}"
