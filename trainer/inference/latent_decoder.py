"""Patch latents of prompts and of images, by the model of stage 1 alone.

Legend: B prompts or images, N patch latents of width D, S image side in pixels for the vision encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ...data import stacked
from ...data.bucket_rule import Shape
from ...data.transforms import decode_shapes, in_shape
from ..distributed.process_group import Group
from ..errors import RunError
from ..models.image_grids import Grid, patch_grid
from ..models.prompt import PromptTemplate
from ..stages import open_patch_latents
from ..stages.patch_latent_model import PatchLatentModel
from ..stages.patch_latents import PatchLatentStage
from .masked_decoding import draw_latent_noise, reveal_counts
from .mllm import decode_prompts, load_mllm
from .settings import Settings
from .stored_runs import stored_recipe

T = TypeVar("T")


@dataclass
class LatentDecoder:
    """Stage 1 on one device. `load_decoder` reads it from a run; a training loop can pass its own modules."""

    mllm: PatchLatentModel
    template: PromptTemplate
    image_size: int
    """S, side in pixels of the vision encoder's images."""
    device: torch.device
    group: Group = field(default_factory=Group)
    """Ranks with the same models, which share the batches of `in_batches`."""
    edits: bool = False
    """Whether stage 1 was trained on editing pairs, so that prompts may have a source image."""
    shapes: tuple[Shape, ...] = ()
    """Height and width in pixels of the images of the aspect-ratio buckets that stage 1 was trained in, if it was."""

    def pixels(self, settings: Settings) -> Shape:
        """Height and width of an image as the vision encoder reads it."""
        assert settings.shape is None, "in squares, for want of a ControlNet whose images have other shapes"
        return self.image_size, self.image_size

    def grid(self, settings: Settings) -> Grid:
        """Rows and columns of the patches of an image."""
        return patch_grid(self.pixels(settings), self.image_size, self.mllm.branch.side)

    def check(self, settings: Settings, with_source: bool = False) -> None:
        """RunError for a shape without training in it, more decoding steps than patches, a temperature that has no
        effect, or a source image without training on editing pairs."""
        height, width = self.pixels(settings)
        if self.shapes and (height, width) not in self.shapes:
            known = ", ".join(f"{w}x{h}" for h, w in self.shapes)
            raise RunError(f"shape {width}x{height}: stage 1 was trained in {known} alone (data.buckets)")
        self.require_edits(with_source)
        reveal_counts(math.prod(self.grid(settings)), settings.steps, settings.schedule)
        draw_latent_noise(self.mllm.head, [], 0, settings.temperature)

    def require_edits(self, with_source: bool) -> None:
        """RunError for a source image without training on editing pairs."""
        if with_source and not self.edits:
            raise RunError(
                "the stage-1 run was not trained on editing pairs (data.sources with task=editing): leave the source"
                " image out, or give a run that was"
            )

    def in_batches(
        self, count: int, batch: int, work: Callable[[slice], list[T]], made: Callable[[int], None]
    ) -> list[T]:
        """The results of `work` for all slices of `batch` of `count` items, in order. Each slice is computed by one
        rank of the group; all ranks call this and get all results, which must be on the CPU.

        made: called with the numbers of items done.
        """
        rank, size, own = self.group.rank, self.group.size, []
        for start in range(rank * batch, count, batch * size):
            own.append(work(slice(start, start + batch)))
            made(min(batch * size, count - (start - rank * batch)))  # by all ranks in this turn
        shares = self.group.gather(own)
        return [item for turn in range(math.ceil(count / batch)) for item in shares[turn % size][turn // size]]

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings = Settings(),
        sources: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Patch latents [B, N, D] decoded from the prompts, as one batch. sources: see `decode_prompts`; RunError if
        the run was not trained on editing pairs."""
        if sources and any(source is not None for source in sources):
            self.check(settings, with_source=True)
        return decode_prompts(self.mllm, self.template, prompts, seeds, settings, self.grid(settings), sources)

    def decoded(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        batch: int,
        made: Callable[[int], None] = lambda count: None,
        sources: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Patch latents [B, N, D] decoded from the prompts in batches, which the ranks share; `made` as in
        `generate`, `sources` as in `latents`."""

        def work(part: slice) -> list[Tensor]:
            shown = sources[part] if sources is not None else None
            return list(self.latents(prompts[part], seeds[part], settings, shown).cpu())

        return torch.stack(self.in_batches(len(prompts), batch, work, made)).to(self.device)

    def source_image(self, image: bytes | Image.Image, settings: Settings = Settings()) -> Tensor:
        """The source image, an image file or one of Pillow's, in the shape of the image to make, as in training, uint8
        [3, H, W]. Raises ValueError for a file that does not decode."""
        shape = self.pixels(settings)
        return stacked(decode_shapes(image, [shape]) if isinstance(image, bytes) else [in_shape(image, shape)])[0]

    def encode(self, images: Tensor) -> Tensor:
        """What the branch predicts, [B, N, D], of uint8 images [B, 3, S, S], or in the shape of a bucket: the vision
        encoder's patch latents."""
        return self.mllm.patch_latents(images.to(self.device))


def load_decoder(
    run: Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    group: Group = Group(),
) -> LatentDecoder:
    """The decoder of a run folder or of an export of one.

    EMA weights are used if the run has them. Default: a GPU with bf16, else CPU with fp32. RunError names what cannot
    be used.
    """
    return read_decoder(run, open_run(run), *usual_device(device, dtype), group)


def open_run(run: Path) -> PatchLatentStage:
    """The stage of a stage-1 run, without weights."""
    return open_patch_latents(stored_recipe(run, "patch-latents"))


def require_native(stage: PatchLatentStage, run: Path) -> None:
    """RunError if the branch does not predict the MLLM's own latents, which alone condition a ControlNet."""
    if (targets := stage.branch.targets) != "native":
        raise RunError(
            f"{run}: branch.targets is {targets}, and a ControlNet takes the MLLM's own latents; such a run is measured"
            " by `bifrost eval --scenes` without --controlnet"
        )


def usual_device(device: torch.device | str | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision models are loaded that are only used for inference."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def read_decoder(
    run: Path,
    stage: PatchLatentStage,
    device: torch.device,
    dtype: torch.dtype,
    group: Group = Group(),
    vision: bool = True,
) -> LatentDecoder:
    """The decoder with the weights of `run`, whose stage is open. vision: with its vision encoder."""
    assert stage.tokenizer is not None
    template = PromptTemplate(stage.tokenizer, stage.branch.max_text_tokens)
    shapes = tuple(bucket.largest for bucket in stage.bucket_rule.buckets) if stage.bucket_rule else ()
    mllm, edits = load_mllm(run, stage, device, dtype, vision), stage.edits
    return LatentDecoder(mllm, template, stage.image_size, device, group, edits, shapes)
