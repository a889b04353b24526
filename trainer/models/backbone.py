"""The frozen multimodal LLM: its vision encoder produces the patch latents, its text model the prefix.

Legend: B samples, T text tokens of a sample, N patches after the encoder's merger, D hidden width, G key heads, C head
width.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  # isort: skip

import copy
from collections.abc import Sequence
from contextlib import nullcontext
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

from ...data.retry import described
from ...kernels import PrefixLayout, Segments, segment_attention
from ...kernels.attention import Backend, to_device
from ...recipes.fields import HeldWeights
from ..errors import RunError
from .backbone_config import PIXEL_MEAN, PIXEL_STD, read_stated
from .eight_bit_source import frozen_source
from .eight_bits import eight_bit_linears, scales
from .language_head import LanguageHead
from .linear import use_own_linear
from .source_tokens import SourceTokens
from .weights import WeightFiles, backbone_names, fill

# transformers passes segment lengths to an attention function only if its name contains "flash".
VISION_ATTENTION = "bifrost_flash_vision"
TEXT_ATTENTION = "bifrost_text"


def read_config(folder: Path) -> Any:  # a Qwen2_5_VLConfig, whose annotations omit attributes
    """The model configuration in `folder`; RunError unless it is a Qwen2.5-VL."""
    stated = read_stated(folder)
    try:
        return Qwen2_5_VLConfig.from_dict(stated)
    except Exception as error:  # its validation raises many types
        raise RunError(
            f"{folder / 'config.json'}: not a valid Qwen2.5-VL config ({described(error)}); fetch it again"
        ) from error


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the prompts in the text model's layers, constant for the branch.

    keys, values: per layer of the branch [sum T, G, C], packed. layout: which rows belong to which sample. after:
    position of the first patch of each of its images, int64 [B K]; None: as many as the prompt's tokens.
    Nothing is appended, so recomputed layers and repeated decoding steps see the same prefix.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: PrefixLayout
    after: Tensor | None = None


class FrozenBackbone(nn.Module):
    """Vision encoder and text model of a Qwen2.5-VL, or one of them. `load` fills the weights."""

    def __init__(
        self,
        config: Any,
        attention: Backend = "sdpa",
        vision_attention: Backend = "sdpa",
        text: bool = True,
        vision: bool = True,
        held: HeldWeights = "bf16",
        attended: Sequence[int] | None = None,
        differentiable: bool = False,
    ) -> None:
        """attention, vision_attention: of the text model, and of the vision encoder. held: how the text model's linear
        layers hold their weights. attended: the text model's layers, in order and the last one included, of which a
        prefix is made; None: all. differentiable: whether gradients will pass through these linear layers."""
        super().__init__()
        self.held: HeldWeights = held
        self.attended = attended
        self.tied = bool(config.tie_word_embeddings)
        config = copy.deepcopy(config)
        dtype = torch.get_default_dtype()  # not the config's, which is the dtype of the stored weights
        with no_init_weights():
            if text:
                with nullcontext() if held == "bf16" else eight_bit_linears(held):
                    self.text = Qwen2_5_VLTextModel._from_config(config.text_config, dtype=dtype)
                if held != "bf16" or differentiable:
                    use_own_linear(self.text)
                self.text.config._attn_implementation = TEXT_ATTENTION
            if vision:
                self.vision = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config, dtype=dtype)
                self.vision.patch_embed.proj.__class__ = _PatchProjection
                self.vision.config._attn_implementation = VISION_ATTENTION
        self.head: LanguageHead | None = None
        self.attention: Backend = attention
        self.vision_attention: Backend = vision_attention
        self.requires_grad_(False)

    def add_head(self) -> None:
        """Build the text model's output layer, too; before `load`."""
        self.head = LanguageHead(self.text.config.vocab_size, self.text.config.hidden_size, self.tied)

    def names(self, files: WeightFiles) -> dict[str, str]:
        """Parameter name -> name in `files`; none for scales of 8-bit weights."""
        found = {}
        for part, module in self.named_children():
            if part == "head":  # which may be the embedding once more
                continue
            skipped = scales(module)
            own = [name for name, _ in module.named_parameters() if name not in skipped]
            found.update({f"{part}.{name}": theirs for name, theirs in backbone_names(part, own, files).items()})
        return found

    def load(self, files: WeightFiles) -> None:
        parameters = dict(self.named_parameters())
        names, source = frozen_source(self, self.names(files), files, self.held)
        fill({theirs: parameters[name] for name, theirs in names.items()}, source, files.path)
        if self.head is not None:
            self.head.load(files)

    def restore_rotary(self) -> None:
        """Rebuild the rotary tables in fp32: `zero.Init` creates every tensor in the compute dtype, and frequencies
        rounded to bf16 are off by whole radians at far positions."""
        device = next(self.buffers()).device
        if hasattr(self, "text"):
            config: Any = self.text.config
            self.text.rotary_emb = Qwen2_5_VLRotaryEmbedding(config).to(device)
        if hasattr(self, "vision"):
            self.vision.rotary_pos_emb = Qwen2_5_VLVisionRotaryEmbedding(self.vision.config).to(device)

    @torch.no_grad()
    def patch_latents(self, images: Tensor) -> Tensor:
        """Latents [B, N, D] of uint8 images [B, 3, H, W], in raster order."""
        vision: Any = self.vision.config
        patches = pixel_patches(images, vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        height, width = (side // vision.patch_size for side in images.shape[-2:])
        return self.latents_of_patches(patches, len(images), height, width)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the latents of images [B, 3, H, W]."""
        vision: Any = self.vision.config
        unit = vision.patch_size * vision.spatial_merge_size
        return images.shape[-2] // unit, images.shape[-1] // unit

    @torch.no_grad()
    def latents_of_patches(self, patches: Tensor, samples: int, height: int, width: int | None = None) -> Tensor:
        """Latents [B, N, D] of pixel patches [B * height * width, 3 * t * p * p] in the processor's order. width: None
        for a square."""
        vision: Any = self.vision.config
        sizes = vision.spatial_merge_size, vision.window_size, vision.patch_size
        geometry = _geometry(samples, height, *sizes, patches.device, width)
        patches = patches.to(self.vision.patch_embed.proj.weight.dtype)
        merged = self.vision(patches, grid_thw=None, backend=self.vision_attention, **geometry).pooler_output
        return merged.view(samples, -1, merged.shape[-1])

    @torch.no_grad()
    def read(self, input_ids: Tensor, layout: PrefixLayout, sources: SourceTokens | None = None) -> tuple[Tensor, Any]:
        """Hidden states [sum T, D] of the packed prompts input_ids [sum T], and their transformers cache."""
        embedded, positions = self._embedded(input_ids, layout, sources)
        out = self.text(
            inputs_embeds=embedded,
            position_ids=positions,
            past_key_values=DynamicCache(),
            use_cache=True,
            layout=layout,
            backend=self.attention,
        )
        return out.last_hidden_state[0], out.past_key_values

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, layout: PrefixLayout, rows: Tensor, targets: Tensor, images: SourceTokens | None = None
    ) -> Tensor:
        """Losses [R] fp32 of the tokens `targets` after `rows`, int64 [R] each, of packed texts input_ids [sum T]."""
        assert self.head is not None
        hidden, _ = self.read(input_ids, layout, images)
        return self.head(hidden[rows], targets)

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, layout: PrefixLayout, sources: SourceTokens | None = None) -> Prefix:
        """Keys and values of the prompts input_ids [sum T], with the latents of their source images, in the attended
        layers.

        The last layer's queries, attention and MLP are neither computed nor gathered: only its keys and values are
        used.
        """
        hidden, positions = self._embedded(input_ids, layout, sources)
        rotation = self.text.rotary_emb(hidden, positions)
        cache = DynamicCache()
        for layer in self.text.layers[:-1]:
            hidden = layer(
                hidden,
                position_embeddings=rotation,
                past_key_values=cache,
                use_cache=True,
                layout=layout,
                backend=self.attention,
            )
        last: Any = self.text.layers[-1]
        hidden = last.input_layernorm(hidden)
        key, value = (
            project(hidden)[0].unflatten(-1, (-1, last.self_attn.head_dim))
            for project in (last.self_attn.k_proj, last.self_attn.v_proj)
        )
        layers: Any = cache.layers
        packed = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in layers]
        packed.append((rotated(key[None], *rotation)[0], value))
        if self.attended is not None:
            packed = [packed[index] for index in self.attended]
        after = None
        if sources is not None:
            after = sources.after.repeat_interleave(len(layout.image.lengths) // len(layout.text.lengths))
        return Prefix(tuple(k for k, _ in packed), tuple(v for _, v in packed), layout, after)

    def _embedded(self, input_ids: Tensor, layout: PrefixLayout, sources: SourceTokens | None) -> tuple[Tensor, Tensor]:
        """The text model's input [1, sum T, D], and the positions of its tokens [3, 1, sum T]."""
        hidden = self.text.embed_tokens(input_ids)
        if sources is None:
            return hidden[None], layout.positions.expand(3, 1, -1)
        latents = sources.latents.flatten(0, 1).to(hidden.dtype)
        return hidden.index_copy(0, sources.rows, latents)[None], sources.positions[:, None]


class _PatchProjection(nn.Conv3d):
    """The patch embedding as a matrix product: kernel and stride equal the patch size. cuDNN has no fast bf16 algorithm
    for a convolution of this shape. Name, shape and hooks of the weight stay the convolution's."""

    def forward(self, input: Tensor) -> Tensor:
        """Patches [P, 3, t, p, p] -> [P, D]."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, heads, C] with rotary embedding applied; cos, sin: [B, S, C]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)


def pixel_patches(images: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """Normalised patches of uint8 images [B, 3, H, W], in the layout of Qwen's image processor.

    Returns [B * H / patch * W / patch, 3 * temporal * patch * patch]: patches of a merge block are adjacent, a still
    image is repeated over the temporal axis.
    """
    mean, std = _pixel_statistics(images.device)
    pixels = (images.float() / 255 - mean) / std
    samples, channels, *sides = pixels.shape
    rows, columns = (side // patch // merge for side in sides)
    pixels = pixels.view(samples, channels, rows, merge, patch, columns, merge, patch)
    pixels = pixels.permute(0, 2, 5, 3, 6, 1, 4, 7)  # sample, block row, block col, row, col, channel, y, x
    pixels = pixels.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, temporal, -1, -1)
    return pixels.reshape(samples * rows * columns * merge**2, -1)


@lru_cache
def _pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [3, 1, 1] each. Cached: copying values to the device synchronises the host."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


def _vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    backend: Backend = "sdpa",
    **_: object,
) -> tuple[Tensor, None]:
    """Attention within the images or windows of one packed row: query, key, value [1, H, S, C] -> [1, S, H, C]."""
    assert cu_seq_lens_q is not None
    count, rows = cu_seq_lens_q.numel() - 1, query.shape[2]
    # Images whose sides are whole windows have windows of one size: their lengths are known without a device sync.
    even = count * max_length_q == rows
    segments = Segments((max_length_q,) * count if even else _lengths(cu_seq_lens_q), cu_seq_lens_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return segment_attention(q, k, v, segments, segments, False, scaling, backend)[None], None


@lru_cache(maxsize=64)
def _lengths(ends: Tensor) -> tuple[int, ...]:
    """Lengths of segments with these ends. Cached, since reading them waits for the device; so are those of
    `_geometry`."""
    return tuple(ends.diff().tolist())


def _text_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: PrefixLayout,
    backend: Backend,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within the prompts of one packed row: query [1, H, S, C] -> [1, S, H, C]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return segment_attention(q, k, v, layout.text, layout.text, True, scaling, backend)[None], None


AttentionInterface.register(VISION_ATTENTION, _vision_attention)
AttentionInterface.register(TEXT_ATTENTION, _text_attention)


@lru_cache(maxsize=64)  # with editing pairs, passes differ in their number of images
def _geometry(
    samples: int, height: int, merge: int, window: int, patch: int, device: torch.device, width: int | None = None
) -> dict[str, Tensor | int]:
    """The vision encoder's index tables for `samples` images of `height` x `width` patches, squares for None; they
    depend on shapes only, so they are cached."""
    width = height if width is None else width
    grid = torch.tensor([[1, height, width]]).expand(samples, 3)
    window_index, window_ends = get_vision_window_index(grid, merge, window, patch)
    return {
        "position_ids": to_device(get_vision_position_ids(grid, merge), device),
        "cu_seqlens": to_device(get_vision_cu_seqlens(grid), device),
        "max_seqlen": height * width,
        "window_index": to_device(window_index, device),
        "cu_window_seqlens": to_device(window_ends, device),
        "max_window_seqlen": int(window_ends.diff().max()),
    }
