"""The scenes on which the tiny FLUX is trained, and the geometry between pixels and FLUX's tokens.

Legend: n scenes of 3 x 64 x 64 pixels, 48 x 16 x 16 after space-to-depth; latents 16 x 16 x 16, packed 64 x 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn import functional as F

from bifrost.data.scenes.drawings import CELL, LOOKS
from bifrost.data.scenes.grammar import Object, Scene, article, plural, render
from bifrost.data.scenes.heldout import held_out_in, training_scenes
from bifrost.data.scenes.places import ARRANGED, CENTRE, LAYOUTS
from bifrost.data.scenes.places import SIZE as SCENE_SIZE
from bifrost.data.transforms import resized

IMAGE_SIZE = 64
DEPTH = 4
"""Side in pixels of the squares that become channels before the VAE."""
LATENT_SIDE, LATENT_CHANNELS = IMAGE_SIZE // DEPTH, 16
SIDE, TOKENS, CHANNELS = LATENT_SIDE // 2, LATENT_SIDE**2 // 4, 4 * LATENT_CHANNELS
SPRITE = SIDE * CELL // SCENE_SIZE
"""Tokens per side of an object's cell."""
MIX = {"single": 0.2, "colour": 0.2, "two": 0.25, "binding": 0.2, "grid": 0.15}
"""Share of each category: no look twice in a scene, since the captions have no numbers."""
ARRANGED_SHARE = 0.75
"""Share of the scenes of several objects that have the layout of equal ones; the others have random layouts."""
JOINTS = (", ", " and ", " with ", " and ", ", ", " next to ", " near ")


def flux_scenes(total: int, seed: int) -> list[Scene]:
    """Training scenes with their objects exchanged at random, in places that their captions do not determine."""
    draws = np.random.default_rng(seed)
    return [_rearranged(scene, draws) for scene in training_scenes(total, seed, MIX)]


def _rearranged(scene: Scene, draws: np.random.Generator) -> Scene:
    looks = [each.look for each in scene.objects]
    if len(set(looks)) == 1 or draws.random() < ARRANGED_SHARE:
        places = ARRANGED[len(looks)]
    else:
        layouts = [layout for layout in LAYOUTS if len(layout) == len(looks)]
        places = layouts[draws.integers(len(layouts))]
    order = draws.permutation(len(looks))
    return scene._replace(objects=tuple(Object(looks[i], place) for i, place in zip(order, places, strict=True)))


def listed(scene: Scene, draws: np.random.Generator) -> tuple[str, Scene]:
    """FLUX's caption: the looks in any order, without places, relations or numbers other than the plural; and the scene
    with its objects in that order."""
    looks = [each.look for each in scene.objects]
    distinct = list(dict.fromkeys(looks))
    order = [distinct[i] for i in draws.permutation(len(distinct))]
    words = [article(look) if looks.count(look) == 1 else plural(look) for look in order]
    text = words[0]
    for word in words[1:]:
        text += JOINTS[draws.integers(len(JOINTS))] + word
    return text, scene._replace(objects=tuple(sorted(scene.objects, key=lambda each: order.index(each.look))))


def to_images(scenes: Sequence[Scene]) -> Tensor:
    """The scenes, uint8 [n, 3, 64, 64]."""
    images = [np.ascontiguousarray(resized(render(scene), IMAGE_SIZE)) for scene in scenes]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def sprite_scenes() -> list[Scene]:
    """Every look that training captions may name, alone in the centre."""
    alone = [Scene("single", article(look), (Object(look, CENTRE),)) for look in LOOKS]
    return [scene for scene in alone if not held_out_in(scene)]


def sprite_cells(tokens: Tensor) -> Tensor:
    """Packed latents [n, 64, 64] of centred sprites by quarter: [n, 4, CHANNELS * SPRITE^2 / 4]."""
    start, half = (SIDE - SPRITE) // 2, SPRITE // 2
    grid = tokens.view(-1, SIDE, SIDE, CHANNELS)[:, start : start + SPRITE, start : start + SPRITE]
    return grid.reshape(-1, 2, half, 2, half, CHANNELS).transpose(2, 3).reshape(len(tokens), 4, -1)


def to_depth(images: Tensor) -> Tensor:
    """uint8 [n, 3, 64, 64] -> -1 .. 1, [n, 48, 16, 16]."""
    return F.pixel_unshuffle(images.float().div(127.5).sub(1), DEPTH)


def to_pixels(depth: Tensor) -> Tensor:
    """[n, 48, 16, 16] -> uint8 [n, 3, 64, 64]."""
    pixels = F.pixel_shuffle(depth.float(), DEPTH)
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def pack(latents: Tensor) -> Tensor:
    """[n, 16, 16, 16] -> [n, 64, 64], FLUX's tokens of 2 x 2 latents."""
    return FluxPipeline._pack_latents(latents, len(latents), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)


def unpack(tokens: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return FluxPipeline._unpack_latents(tokens, LATENT_SIDE, LATENT_SIDE, 1)


def image_ids() -> Tensor:
    """FLUX's positions of the 64 tokens, [64, 3]."""
    return FluxPipeline._prepare_latent_image_ids(1, SIDE, SIDE, "cpu", torch.float32)


def psnr(images: Tensor, others: Tensor) -> float:
    """PSNR in dB between uint8 images, from the mean squared error over all of them."""
    error = (images.float() - others.float()).square().mean()
    return 10 * (255**2 / error).log10().item()
