"""The weights of a full branch from one with low-rank pairs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...recipes.branch import Branch
from ...recipes.fields import HeldWeights
from ..models.backbone import FrozenBackbone
from ..models.backbone_config import branch_layers
from ..models.branch import GenerationBranch
from ..models.eight_bit_source import frozen_source
from ..models.eight_bits import dequantized
from ..models.weights import Source, WeightFiles
from ..stages.branch_weights import text_layer
from .safetensors_parts import Piece


def merged(
    pieces: Mapping[str, Piece], config: Any, branch: Branch, held: HeldWeights, files: WeightFiles, dtype: torch.dtype
) -> dict[str, Piece]:
    """The trained `pieces` of a branch with low-rank pairs as those of a full one, of type `dtype`: each projection is
    the text model's, as training held it, plus its pair.

    config: the backbone's Qwen2_5_VLConfig. files: of the backbone; held: how training held its weights.
    """
    layers = branch_layers(config, branch.layers)
    with torch.device("meta"):
        full = GenerationBranch(config.text_config, 1, branch.positions, False, layers=len(layers))
        backbone = FrozenBackbone(config, vision=False, held=held)
    names, source = frozen_source(backbone, backbone.names(files), files, held)
    found = {}
    for short, parameter in full.named_parameters():
        name = f"branch.{short}"
        if name in pieces:
            found[name] = pieces[name]
            continue
        text = text_layer(name, layers).replace("branch.", "text.", 1)
        scale = names.get(f"{text.removesuffix('.weight')}.scale")
        read = partial(frozen_weight, source, names[text], tuple(parameter.shape), scale)
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in pieces:
            pair = pieces[f"{stem}.lora_A"], pieces[f"{stem}.lora_B"]
            read = partial(_with_pair, read, *pair, branch.lora.scale)
        found[name] = Piece(name, tuple(parameter.shape), dtype, read)
    return {**found, **{name: piece for name, piece in pieces.items() if name.startswith("head.")}}


def frozen_weight(source: Source, name: str, shape: tuple[int, ...], scale: str | None) -> Tensor:
    """A frozen weight or bias in fp32. scale: name of the scales of a weight in 8 bits."""
    count = torch.Size(shape).numel()
    bits = None if scale is None else source.flat(scale, 0, shape[0])
    values = source.flat(name, 0, count).view(shape)
    return values.float() if bits is None else dequantized(values, bits, torch.float32)


def _with_pair(read: partial[Tensor], a: Piece, b: Piece, scale: float) -> Tensor:
    return read() + scale * (b.read().float() @ a.read().float())
