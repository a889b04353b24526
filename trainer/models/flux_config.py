"""The configs of a FLUX folder: its parts' shapes, the geometry of its latents and the lengths of its prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import AliasChoices, Field, PositiveInt

from ...recipes.fields import HeldWeights
from ...recipes.stage2 import T5_TOKENS
from ..errors import RunError
from .config_files import AttentionSettings, Settings, checked, read_json

Part = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts with weights: FLUX transformer, VAE, CLIP and T5."""
SPACE_TO_DEPTH_KEY = "_bifrost_space_to_depth"
"""In `vae/config.json`: side of the pixel blocks folded into channels before the VAE; default 1."""


class ClipConfig(AttentionSettings):
    """CLIP's text encoder, with transformers' defaults."""

    vocab_size: PositiveInt = 49408
    hidden_size: PositiveInt = 512
    intermediate_size: PositiveInt = 2048
    num_hidden_layers: int = Field(default=12, ge=0)
    num_attention_heads: PositiveInt = 8
    max_position_embeddings: PositiveInt = 77


class T5Config(Settings):
    """T5, with transformers' defaults."""

    vocab_size: PositiveInt = 32128
    d_model: PositiveInt = Field(default=512, validation_alias=AliasChoices("d_model", "hidden_size"))
    d_kv: PositiveInt = Field(default=64, validation_alias=AliasChoices("d_kv", "head_dim"))
    d_ff: PositiveInt = 2048
    num_layers: int = Field(default=6, ge=0, validation_alias=AliasChoices("num_layers", "num_hidden_layers"))
    num_heads: PositiveInt = Field(default=8, validation_alias=AliasChoices("num_heads", "num_attention_heads"))
    relative_attention_num_buckets: PositiveInt = 32
    feed_forward_proj: str = Field(default="relu", pattern="^(gated-)?[^-]+$")
    is_gated_act: bool | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate, as in T5 1.1."""
        return self.feed_forward_proj.startswith("gated-") if self.is_gated_act is None else self.is_gated_act


@dataclass(frozen=True)
class FluxConfig:
    """A FLUX.1 model in diffusers' folder layout: the configs of its parts."""

    path: Path
    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: ClipConfig
    t5: T5Config
    held: HeldWeights = "bf16"
    """How the transformer's blocks hold their weights."""
    text_tokens: int = T5_TOKENS
    """Most T5 tokens of a prompt."""

    @classmethod
    def open(cls, path: Path, held: HeldWeights = "bf16", text_tokens: int = T5_TOKENS) -> FluxConfig:
        """Open and check a folder's configs. RunError names what is missing or inconsistent."""
        require_files(path, [f"{part}/config.json" for part in PARTS])
        transformer, vae, clip, t5 = (_read(path / part / "config.json") for part in PARTS)
        if (name := transformer.get("_class_name")) != "FluxTransformer2DModel":
            raise RunError(f"{path}/transformer/config.json: _class_name is {name}, expected FluxTransformer2DModel")
        folder = cls(
            path,
            transformer,
            vae,
            checked(ClipConfig, clip, path / "text_encoder" / "config.json", "CLIP"),
            checked(T5Config, t5, path / "text_encoder_2" / "config.json", "T5"),
            held,
            text_tokens,
        )
        for field, part, there in (
            ("in_channels", "4 x vae latent_channels", 4 * vae["latent_channels"]),
            ("joint_attention_dim", "text_encoder_2 d_model", folder.t5.d_model),
            ("pooled_projection_dim", "text_encoder hidden_size", folder.clip.hidden_size),
        ):
            if (here := transformer[field]) != there:
                raise RunError(f"{path}: transformer {field} is {here}, {part} is {there}; parts of different models?")
        if vae["in_channels"] != 3 * folder.depth**2:
            raise RunError(
                f"{path}/vae/config.json: in_channels {vae['in_channels']} are not 3 x {folder.depth} x {folder.depth}"
                f" ({SPACE_TO_DEPTH_KEY})"
            )
        return folder

    @property
    def guided(self) -> bool:
        """Whether this FLUX takes a guidance scale: dev does, schnell does not."""
        return bool(self.transformer.get("guidance_embeds"))

    @property
    def blocks(self) -> tuple[int, int]:
        """The transformer's double and single blocks."""
        return self.transformer["num_layers"], self.transformer["num_single_layers"]

    @property
    def depth(self) -> int:
        return self.vae.get(SPACE_TO_DEPTH_KEY, 1)

    @property
    def stride(self) -> int:
        """Pixels per latent along one side."""
        return self.depth * 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def text_lengths(self) -> tuple[int, int]:
        """Tokens to which prompts are padded for T5 and for CLIP.

        For T5 `text_tokens`, but at most 512 or 256, as dev and schnell were trained; the tokenizers of a smaller model
        set their own limits.
        """
        limits = [_tokenizer_limit(self.path / name) for name in ("tokenizer_2", "tokenizer")]
        t5 = min(limits[0], T5_TOKENS if self.guided else 256, self.text_tokens)
        return int(t5), int(min(limits[1], self.clip.max_position_embeddings))

    def grid(self, image_size: int) -> int:
        """Packed tokens along one side of an image; RunError unless the size is a multiple of a token."""
        unit = 2 * self.stride
        if image_size < unit or image_size % unit:
            below = max(1, image_size // unit) * unit
            raise RunError(
                f"flux.image_size={image_size}: does not fit {self.path}; set a multiple of {unit}, such as {below}"
            )
        return image_size // unit

    def values_of_patch(self, image_size: int, side: int) -> int:
        """Values of the VAE's latents in each of `side` x `side` patches of an image of `image_size` pixels; RunError
        unless they divide."""
        latents, unit = 2 * self.grid(image_size), math.lcm(side, 2) * self.stride
        if latents % side:
            near = max(1, round(image_size / unit)) * unit
            raise RunError(
                f"flux.image_size={image_size}: {latents} x {latents} VAE latents do not divide into {side} x {side}"
                f" patches; set a multiple of {unit}, such as {near}"
            )
        return self.vae["latent_channels"] * (latents // side) ** 2


def require_files(path: Path, patterns: list[str]) -> None:
    """RunError names the patterns that match no file in the FLUX folder `path`."""
    if missing := [name for name in patterns if not any(path.glob(name))]:
        raise RunError(f"{path}: not a complete FLUX folder: {', '.join(missing)} missing; fetch it again")


_REQUIRED = {
    "transformer": ("in_channels", "num_layers", "num_single_layers", "joint_attention_dim", "pooled_projection_dim"),
    "vae": ("in_channels", "latent_channels", "block_out_channels"),
}


def _read(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    if missing := [name for name in _REQUIRED.get(file.parent.name, ()) if name not in settings]:
        raise RunError(f"{file}: {', '.join(missing)} missing; fetch it again")
    return settings


def _tokenizer_limit(folder: Path) -> float:
    """The longest prompt in tokens that the tokenizer in `folder` states; infinite without one."""
    file = folder / "tokenizer_config.json"
    limit = read_json(file).get("model_max_length") if file.is_file() else None
    return limit if isinstance(limit, (int, float)) else math.inf
