"""A model with random weights, and the scale of stage 1's: real shapes on a GPU, scaled down in proportion on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import RunError
from ..stages.patch_latent_model import PatchLatentModel

M = TypeVar("M", bound=nn.Module)

VOCABULARY = 4096
"""Vocabulary size of a scaled-down model: the embedding costs no FLOPs, only memory."""


def scaled(config: Any, layers: int | None, width: int | None) -> Any:
    """A copy of a Qwen2_5_VLConfig with the given layers and width; None keeps the model's own.

    Heads keep their width; MLP, groups of heads and the vision encoder including its depth shrink in proportion.
    RunError unless the width is a multiple of the head width.
    """
    config = copy.deepcopy(config)
    text, vision = config.text_config, config.vision_config
    layers = layers or text.num_hidden_layers
    if layers > text.num_hidden_layers:
        raise RunError(f"--layers {layers}: the model has {text.num_hidden_layers}")
    depth = max(1, round(vision.depth * layers / text.num_hidden_layers))
    ends = {max(0, round((i + 1) * depth / vision.depth) - 1) for i in vision.fullatt_block_indexes}
    vision.depth, vision.fullatt_block_indexes = depth, sorted(ends)
    text.num_hidden_layers, text.layer_types = layers, text.layer_types[:layers]
    if width is None or width == text.hidden_size:
        return config
    head, share = text.hidden_size // text.num_attention_heads, width / text.hidden_size
    if width < head or width % head:
        raise RunError(f"--width {width}: give a multiple of {head}, the width of a head")
    heads, group = width // head, text.num_attention_heads // text.num_key_value_heads
    text.num_key_value_heads = next(n for n in range(max(1, heads // group), heads + 1) if heads % n == 0)
    text.num_attention_heads, text.hidden_size, text.head_dim = heads, width, head
    text.intermediate_size = 64 * max(1, round(share * text.intermediate_size / 64))
    text.vocab_size = min(VOCABULARY, text.vocab_size)
    head = vision.hidden_size // vision.num_heads
    vision.num_heads = max(1, round(share * vision.num_heads))
    vision.hidden_size = head * vision.num_heads
    vision.intermediate_size = 4 * max(1, round(share * vision.intermediate_size / 4))
    vision.out_hidden_size = width
    return config


def random_model(build: Callable[[], PatchLatentModel], device: torch.device, dtype: torch.dtype) -> PatchLatentModel:
    """The model that `build` makes, with random weights."""
    model = built(build, device, dtype)
    model.restore_rotary()
    draw_weights(model, device)
    return model


def built(build: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """What `build` makes on `device`, its weights of type `dtype` and not yet filled."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = build()
    finally:
        torch.set_default_dtype(before)
    return model.to(device)


def draw_weights(model: nn.Module, device: torch.device) -> None:
    """Random weights, equal for equal shapes on the same device: normal with deviation 0.02, around 1 for norms."""
    draw = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = nn.init.normal_(parameter, std=0.02, generator=draw)
        if parameter.ndim == 1 and name.endswith("weight"):  # a norm's: all others are matrices
            scale.data.add_(1)
