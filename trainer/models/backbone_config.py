"""The settings of a Qwen2.5-VL that determine its shapes, with transformers' defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, PositiveInt, field_validator, model_validator

from ..errors import RunError
from .config_files import AttentionSettings, Settings, checked, read_json

# CLIP's pixel mean and standard deviation, which Qwen's image processor uses.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionConfig(Settings):
    """The vision encoder's settings."""

    depth: int = Field(default=32, ge=0, validation_alias=AliasChoices("depth", "num_hidden_layers"))
    hidden_size: PositiveInt = 3584
    intermediate_size: PositiveInt = 3420
    num_heads: PositiveInt = Field(default=16, validation_alias=AliasChoices("num_heads", "num_attention_heads"))
    in_channels: PositiveInt = 3
    patch_size: PositiveInt = 14
    spatial_merge_size: PositiveInt = 2
    temporal_patch_size: PositiveInt = 2
    window_size: PositiveInt = 112
    out_hidden_size: PositiveInt = 3584
    fullatt_block_indexes: list[int] = Field(default=[7, 15, 23, 31])


class TextConfig(AttentionSettings):
    """The text model's settings."""

    vocab_size: PositiveInt = 152064
    hidden_size: PositiveInt = 8192
    intermediate_size: PositiveInt = 29568
    num_hidden_layers: int = Field(default=80, ge=0)
    num_attention_heads: PositiveInt = 64
    num_key_value_heads: PositiveInt = 8

    @model_validator(mode="before")
    @classmethod
    def _as_many_keys(cls, stated: Any) -> Any:
        """Without grouping, a config may state null: as many key heads as attention heads."""
        if isinstance(stated, dict) and "num_key_value_heads" in stated and stated["num_key_value_heads"] is None:
            return {**stated, "num_key_value_heads": stated.get("num_attention_heads", 64)}
        return stated


class BackboneConfig(Settings):
    """The model's settings; `text_config` may be written flat, as in the configs on the hub."""

    text_config: TextConfig
    vision_config: VisionConfig

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, stated: Any) -> Any:
        own = {name: value for name, value in stated.items() if name in TextConfig.model_fields}
        found = dict(stated)
        for name, default in (("text_config", own), ("vision_config", {})):
            if found.get(name) is None:
                found[name] = default
        return found

    @field_validator("text_config", "vision_config", mode="before")
    @classmethod
    def _object(cls, stated: Any) -> Any:
        if not isinstance(stated, dict):
            raise ValueError("not an object")
        return stated


def read_stated(folder: Path) -> dict[str, Any]:
    """The content of `config.json` in `folder`; RunError unless it is a Qwen2.5-VL's with the usual pixel values."""
    file = folder / "config.json"
    if not file.is_file():
        raise RunError(f"{folder}: no config.json; backbone.path must be a Qwen2.5-VL model folder")
    stated = read_json(file)
    if (kind := stated.get("model_type")) != "qwen2_5_vl":
        raise RunError(f"{file}: model_type is {kind}, expected qwen2_5_vl")
    _require_pixels(folder)
    return stated


def read_shape(folder: Path) -> BackboneConfig:
    """The settings in `folder`; RunError unless it is a Qwen2.5-VL."""
    return checked(BackboneConfig, read_stated(folder), folder / "config.json", "Qwen2.5-VL")


def grid_side(config: Any, image_size: int) -> int:
    """Patches along one side of a square image, after the vision encoder's merger; RunError if it does not divide."""
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    if image_size % unit:
        below = image_size // unit * unit
        fits = f"{below} or {below + unit}" if below else f"{unit}"
        raise RunError(f"data.image_size {image_size} is not a multiple of {unit} (patch x merge): set {fits}")
    return image_size // unit


def branch_layers(config: Any, layers: int | None) -> tuple[int, ...]:
    """The text model's layers that the branch's `layers` layers copy and attend to, in order: spread evenly, the last
    one included; all for None. RunError if the text model has fewer."""
    count = config.text_config.num_hidden_layers
    if layers is not None and layers > count:
        raise RunError(f"branch.layers={layers}: the text model has {count} layers; set at most that many")
    own = count if layers is None else layers
    return tuple((place + 1) * count // own - 1 for place in range(own))


def require_same_grid(config: Any, image_size: int, side: int) -> None:
    """RunError unless the vision encoder of `branch.encoder` gives `side` x `side` latents of an image of `image_size`
    pixels."""
    if (found := grid_side(config, image_size)) != side:
        raise RunError(
            f"branch.encoder: gives {found} x {found} latents of a {image_size} px image, the MLLM has {side} x {side}"
            " patches; give an encoder with the same patch and merge size"
        )


def require_targets(config: Any, targets: str, image_size: int) -> None:
    """RunError if a patch of an image of `image_size` pixels has too few of them for these `branch.targets`."""
    values, width = 3 * image_size**2 // grid_side(config, image_size) ** 2, config.text_config.hidden_size
    if targets in ("pca", "random") and values < width:
        raise RunError(
            f"branch.targets={targets}: a patch has {values:,} values, fewer than the {width:,} channels that the"
            " branch predicts"
        )


def _require_pixels(folder: Path) -> None:
    """RunError if the image processor's normalisation differs from `pixel_patches`. The processor file is optional."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (file := folder / name).is_file():
            continue
        stated = read_json(file)
        stated = stated.get("image_processor", stated)
        for key, ours in (("image_mean", PIXEL_MEAN), ("image_std", PIXEL_STD)):
            theirs = stated.get(key, ours)
            if len(theirs) != 3 or max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 1e-4:
                raise RunError(f"{file}: {key} is {theirs}, training uses Qwen2.5-VL's {list(ours)}")
