"""The arguments of a call of `BifrostPipeline`, checked: RunError names one that cannot be used, and what to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import torch
from PIL import Image
from torch import Tensor

from ..errors import RunError
from .outputs import clean

LARGEST_SEED = 2**62


def prompts_of(prompt: str | Sequence[str], copies: int) -> list[str]:
    """The cleaned prompts, each `copies` times."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not _is_list(texts) or not texts or not all(isinstance(each, str) for each in texts):
        raise RunError("prompt: give a string, or a list of at least one")
    if not _is_whole(copies) or copies < 1:
        raise RunError(f"num_images_per_prompt={copies!r}: give a whole number of 1 or more")
    return [text for each in texts for text in [clean(each)] * copies]


def seeds_of(
    count: int, copies: int, seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[int]:
    """The seed of each of `count` images, `copies` of each prompt."""
    if seed is not None:
        if generator is not None:
            raise RunError("give seed or generator, not both")
        if not _is_whole(seed) or not 0 <= seed <= LARGEST_SEED - copies:
            raise RunError(f"seed={seed!r}: give a whole number from 0 to 2^62 - {copies}")
        return [int(seed) + number for _ in range(count // copies) for number in range(copies)]
    each: list[Any] = list(generator) if _is_list(generator) else [generator] * count
    if not all(one is None or isinstance(one, torch.Generator) for one in each):
        raise RunError("generator: give a torch.Generator, or a list of one for each image")
    if len(each) != count:
        raise RunError(f"{len(each)} generators for {count} images: give one for each, or one for all")
    return [int(torch.randint(LARGEST_SEED, (), generator=one, device=one and one.device)) for one in each]


def shape_of(height: int | None, width: int | None, side: int) -> str | None:
    """The shape of `Settings`; one that is not given is the square's `side`."""
    if height is None and width is None:
        return None
    return f"{side if width is None else width}x{side if height is None else height}"


def sources_of(image: Any, count: int, copies: int, read: Callable[[Image.Image], Tensor]) -> list[Tensor] | None:
    """The source image of each of `count` images, `copies` of each prompt, as `read` returns it."""
    if image is None:
        return None
    prompts = count // copies
    images = list(image) if _is_list(image) else [image] * prompts
    if not all(isinstance(each, Image.Image) for each in images):
        raise RunError("image: give a PIL image, or a list of one for each prompt")
    if len(images) != prompts:
        raise RunError(f"image: {len(images)} for {prompts} prompts: give one for each, or one for all")
    try:
        return [source for each in images for source in [read(each)] * copies]
    except ValueError as error:
        raise RunError(f"image: {error}; give an image that can be read") from error


def require_patch_latents(patch_latents: Any, image: Any, shape: tuple[int, int, int]) -> None:
    """RunError unless given patch latents are [B, N, D], `shape`, and no source image is to be read."""
    if image is not None:
        raise RunError("image is read to decode latents, and with patch_latents none are decoded: leave one out")
    if not isinstance(patch_latents, Tensor):
        raise RunError(f"patch_latents: is of type {type(patch_latents).__name__}; give a tensor of {list(shape)}")
    if tuple(patch_latents.shape) != shape:
        raise RunError(f"patch_latents: of shape {list(patch_latents.shape)}; give {list(shape)}, one [N, D] per image")


def replaced(changed: Any, latents: Tensor) -> Tensor:
    """The latents that a callback returned in place of `latents`, or these."""
    if changed is None or (isinstance(changed, dict) and "latents" not in changed):
        return latents
    given = changed["latents"] if isinstance(changed, dict) else None
    if not isinstance(given, Tensor) or given.shape != latents.shape:
        wanted = f"{{'latents': a tensor of {list(latents.shape)}}}"
        raise RunError(f"callback_on_step_end: returned other than {wanted}; return that, or None to change nothing")
    return given


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
