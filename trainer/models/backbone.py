"""The frozen multimodal LLM: its vision tower gives the patch latents, its text model the prefix.

Legend: B samples, T text tokens, N patches after the tower's merger, P patches before it, D hidden width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Qwen2_5_VLConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import AttentionInterface
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
    Qwen2_5_VLVisionRotaryEmbedding,
)
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from ...recipes import FOLDER as RECIPES
from ..errors import RunError

# transformers hands an attention function the segment lengths only if "flash" is part of its name.
SEGMENT_ATTENTION = "bifrost_flash_segments"

# Mean and standard deviation of CLIP's pixels, which Qwen's image processor normalises with.
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def locate(path: str, revision: str | None = None) -> Path:
    """The folder that holds a model: `builtin:NAME`, a local folder, or a hub id (downloaded once, then cached)."""
    if path.startswith("builtin:"):
        folder = RECIPES / "foundations" / path.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{p.name}" for p in sorted((RECIPES / "foundations").iterdir()))
            raise RunError(f"backbone.path={path}: no such built-in model; there is {known}")
        return folder
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise RunError(f"backbone.path={path}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds; all mean that the model is not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"backbone.path={path}: cannot be downloaded ({reason}); give a local folder instead") from error


def read_config(folder: Path) -> Any:  # a Qwen2_5_VLConfig, whose annotations promise less than it holds
    """The model configuration in `folder`; RunError unless it is a Qwen2.5-VL."""
    file = folder / "config.json"
    if not file.is_file():
        raise RunError(f"{folder}: no config.json; backbone.path must be a Qwen2.5-VL model folder")
    config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type != "qwen2_5_vl":
        raise RunError(f"{file}: model_type is {config.model_type}, a qwen2_5_vl is needed")
    return config


@dataclass(frozen=True)
class Prefix:
    """A caption's keys and values in every layer of the text model, constant for the branch.

    keys, values: per layer [B, G, T, C]; mask [B, T], True where a token is real; lengths [B] real tokens.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """What transformers' attention asks of a cache: text and image keys in one row. Stores nothing, so that
        recomputed layers and repeated decode steps see the same prefix."""
        return torch.cat((self.keys[layer_idx], key), dim=2), torch.cat((self.values[layer_idx], value), dim=2)


class FrozenBackbone(nn.Module):
    """Vision tower and text model of a Qwen2.5-VL. Weights are left unset: `weights.fill` loads them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        with no_init_weights():
            self.text = Qwen2_5_VLTextModel._from_config(config.text_config, attn_implementation="sdpa")
            self.vision = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.vision.config._attn_implementation = SEGMENT_ATTENTION
        self.requires_grad_(False)

    def restore_rotary(self) -> None:
        """Rebuild the rotary tables in fp32: under `zero.Init` every tensor is born in the compute dtype, and
        frequencies rounded to bf16 move far positions by whole radians."""
        device = next(self.buffers()).device
        config: Any = self.text.config
        self.text.rotary_emb = Qwen2_5_VLRotaryEmbedding(config).to(device)
        self.vision.rotary_pos_emb = Qwen2_5_VLVisionRotaryEmbedding(self.vision.config).to(device)

    @torch.no_grad()
    def patch_latents(self, images: Tensor) -> Tensor:
        """Latents [B, N, D] of uint8 images [B, 3, S, S], in raster order."""
        vision: Any = self.vision.config
        patches = pixel_patches(images, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        return self.latents_of_patches(patches, len(images), images.shape[-1] // vision.patch_size)

    @torch.no_grad()
    def latents_of_patches(self, patches: Tensor, samples: int, side: int) -> Tensor:
        """Latents [B, N, D] of pixel patches [B * side^2, 3 * t * p * p] in the processor's order."""
        vision: Any = self.vision.config
        geometry = _geometry(
            samples, side, vision.spatial_merge_size, vision.window_size, vision.patch_size, patches.device
        )
        patches = patches.to(self.vision.patch_embed.proj.weight.dtype)
        merged = self.vision(patches, grid_thw=None, **geometry).pooler_output
        return merged.view(samples, -1, merged.shape[-1])

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, text_mask: Tensor) -> Prefix:
        """Keys and values of the prompts input_ids [B, T], of which text_mask [B, T] marks the real tokens."""
        positions = text_positions(text_mask)
        cache = self.text(
            input_ids=input_ids,
            attention_mask=text_mask,
            position_ids=positions.expand(3, -1, -1),
            past_key_values=DynamicCache(),
            use_cache=True,
        ).past_key_values
        assert cache is not None
        return Prefix(
            tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers), text_mask
        )


def text_positions(text_mask: Tensor) -> Tensor:
    """Rotary positions [B, T]: 0, 1, … over the real tokens; padding gets 1, as in the public release."""
    return (text_mask.long().cumsum(dim=1) - 1).masked_fill(~text_mask, 1)


def pixel_patches(images: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """Normalised patches of uint8 images [B, 3, S, S], as Qwen's image processor lays them out.

    Returns [B * (S / patch)^2, 3 * temporal * patch * patch]: patches of one merge block stand together, a still image
    is repeated over the temporal axis.
    """
    mean = torch.tensor(_PIXEL_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(_PIXEL_STD, device=images.device).view(3, 1, 1)
    pixels = (images.float() / 255 - mean) / std
    samples, channels, side, _ = pixels.shape
    blocks = side // patch // merge
    pixels = pixels.view(samples, channels, blocks, merge, patch, blocks, merge, patch)
    pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7)  # sample, block row, block col, row, col, channel, y, x
    pixels = pixels.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, temporal, -1, -1)
    return pixels.reshape(samples * (blocks * merge) ** 2, -1)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within segments of one packed row: query, key, value [1, H, S, C] -> [1, S, H, C].

    Segments of one length (square images of one size) become the batch axis of a single call, so that the cost is
    linear in the number of images and windows. Ragged ones are looped over.
    """
    assert cu_seq_lens_q is not None
    rows, heads, total, width = query.shape
    count = cu_seq_lens_q.numel() - 1
    if count * max_length_q == total:
        q, k, v = (x.view(heads, count, max_length_q, width).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        return out.permute(0, 2, 1, 3).reshape(rows, total, heads, width), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = torch.cat([F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts], dim=2)
    return out.transpose(1, 2), None


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)


@lru_cache(maxsize=8)
def _geometry(
    samples: int, side: int, merge: int, window: int, patch: int, device: torch.device
) -> dict[str, Tensor | int]:
    """The tower's index tables for `samples` square images; they depend on shapes alone, so a run makes them once."""
    grid = torch.tensor([[1, side, side]]).expand(samples, 3)
    window_index, window_ends = get_vision_window_index(grid, merge, window, patch)
    return {
        "position_ids": get_vision_position_ids(grid, merge).to(device),
        "cu_seqlens": get_vision_cu_seqlens(grid).to(device),
        "max_seqlen": side * side,
        "window_index": window_index.to(device),
        "cu_window_seqlens": window_ends.to(device),
        "max_window_seqlen": int(window_ends.diff().max()),
    }
