"""FLOPs per sample of stage 1's parts: linear layers counted from their shapes, attention from its mask.

A FLOP is half a multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...recipes.branch import Branch
from ..models.backbone_config import branch_layers, grid_side
from ..models.masking import hidden_counts
from . import shapes
from .opened import PatchLatents
from .shapes import Weight

Gradient = Literal["none", "through", "trained"]
Count = Callable[[str], float]
"""Module name -> number of times its weight is applied per sample."""

ATTENTION_BACKWARD = 2.5
"""Ratio of attention's backward FLOPs to its forward FLOPs: five products instead of two."""

# Elements saved by autograd per token and layer, in units of the widths; planner/test_flops.py measures them.
BRANCH_KEPT = (6, 2, 2)
"""Decoder layer: times hidden width, MLP width, key width (the last for text rows too)."""
BRANCH_RECOMPUTED = (6, 4, 2)
"""The same for a layer during its recomputation."""
FLOW_KEPT, FLOW_ENDS = 10, 6
"""A block of a flow head per noise draw, and what is outside of its blocks, times the head's width."""


@dataclass(frozen=True)
class Part:
    """One part of the model: its parameters and its cost per sample.

    parameters: elements of every parameter, in order; widths: bytes of an element of each, None for those of the run's
    precision, empty if all are. linear, attention: FLOPs of the forward pass. returned_linear,
    returned_attention: the portion that gradients flow back through. first: FLOPs of trained layers whose inputs need
    no gradient. kept: bytes saved by autograd; kept_recomputed: the same with every layer recomputed; kept_once: the
    same of what all samples of a micro-batch share, in bytes per micro-batch. layer: bytes of the layer being
    recomputed; gradients: bytes of activation gradients in flight, gradients_recomputed: the same next to a recomputed
    layer. last: FLOPs at the end of the layers whose results are not saved: recomputation stops before them. place: as
    in recipes' `Placement`.
    """

    name: str
    gradient: Gradient
    parameters: tuple[int, ...]
    linear: float
    attention: float
    place: str = "sharded"
    returned_linear: float = 0.0
    returned_attention: float = 0.0
    first: float = 0.0
    kept: float = 0.0
    kept_recomputed: float = 0.0
    kept_once: float = 0.0
    layer: float = 0.0
    gradients: float = 0.0
    gradients_recomputed: float = 0.0
    last: float = 0.0
    widths: tuple[int | None, ...] = ()

    def stored(self, plain: int) -> list[tuple[int, int]]:
        """Elements and bytes per element of every parameter, in order. plain: bytes in the run's precision."""
        widths = self.widths or (None,) * len(self.parameters)
        return [(size, width or plain) for size, width in zip(self.parameters, widths, strict=True)]

    @property
    def size(self) -> int:
        return sum(self.parameters)

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """2 FLOPs per weight and token for the gradient of each input that needs one, and of each trained weight."""
        products = {"none": 0, "through": 1, "trained": 2}[self.gradient]
        return products * self.returned_linear - self.first + self.backward_attention

    @property
    def backward_attention(self) -> float:
        return ATTENTION_BACKWARD * self.returned_attention

    @property
    def recomputed(self) -> float:
        """FLOPs of the second forward pass of recomputed layers; only with activation checkpointing."""
        return self.forward - self.last if self.layer else 0.0


def linear_flops(weights: Iterable[Weight], count: Count) -> float:
    """FLOPs of all linear layers and convolutions among `weights`."""
    return sum(2.0 * w.size * count(w.name.removesuffix(".weight")) for w in weights if w.product)


def sizes(weights: Iterable[Weight]) -> tuple[int, ...]:
    return tuple(weight.size for weight in weights)


def widths(weights: Iterable[Weight]) -> tuple[int | None, ...]:
    return tuple(weight.width for weight in weights)


def patch_latent_parts(model: PatchLatents, precision: str, text: float) -> list[Part]:
    """Stage 1's parts for prompts of `text` tokens. precision: `bf16` or `fp32`."""
    config, side = model.config.text_config, grid_side(model.config, model.image_size)
    width, patches = config.hidden_size, side * side
    layers = len(branch_layers(model.config, model.branch.layers))
    prefix, head = list(shapes.text_model(config, model.backbone.weights)), list(shapes.head(width, model.branch))
    branch = list(shapes.branch(config, side, model.branch))
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    byte = 2 if precision == "bf16" else 4
    draws, placement = model.branch.draws, model.backbone.placement
    drawn = draws * patches
    layer, recomputed = (
        draws * byte * (patches * (hidden * width + mlp * config.intermediate_size) + key * keys * (patches + text))
        for hidden, mlp, key in (BRANCH_KEPT, BRANCH_RECOMPUTED)
    )
    normed = byte * drawn * width  # the input of the final norm
    read_again = byte * layers * 2 * keys * text  # the prefix, which a layer copies, and reads again if recomputed
    rows = float(drawn)
    if model.branch.loss_tokens == "masked":
        samples = np.arange(4096)
        counts = hidden_counts(model.branch.mask_rate, model.seed, np.zeros_like(samples), samples, patches)
        rows = draws * float(counts.mean())
    linear = linear_flops(branch, lambda name: drawn)
    attention = 4.0 * drawn * (text + patches) * width * layers

    def read(name: str) -> float:
        """Of the last layer, only keys and values are computed."""
        last = f"layers.{config.num_hidden_layers - 1}."
        return text if not name.startswith(last) or name.endswith(("k_proj", "v_proj")) else 0.0

    return [
        vision_encoder_part(model.config.vision_config, model.image_size, model.backbone.vision_encoder or placement),
        Part(
            "text prefix",
            "none",
            sizes(prefix),
            linear_flops(prefix, read),
            2.0 * text * text * width * (config.num_hidden_layers - 1),
            placement,
            widths=widths(prefix),
        ),
        Part(
            "generation branch",
            "trained",
            sizes(branch),
            linear,
            attention,
            returned_linear=linear,
            returned_attention=attention,
            kept=layers * layer + normed,
            kept_recomputed=layers * byte * drawn * width + normed + read_again,
            layer=recomputed,
            gradients=byte * drawn * (3 * config.intermediate_size + width),
            gradients_recomputed=byte * drawn * (config.intermediate_size + 2 * width),  # torch's own SwiGLU
            last=linear_flops(branch, lambda name: drawn if name.endswith("down_proj") else 0.0),
        ),
        head_part(head, model.branch, width, rows, byte),
    ]


def head_part(weights: Sequence[Weight], settings: Branch, width: int, rows: float, byte: int) -> Part:
    """The head on `rows` tokens per sample. settings: of the branch; byte: of an element in the run's precision."""
    flow, own = settings.flow_head, sizes(weights)
    if settings.head == "linear":
        linear = linear_flops(weights, lambda name: rows)
        kept = 2 * rows * width * byte  # hidden states, and the residual of a fused kernel
        return Part("head", "trained", own, linear, 0.0, returned_linear=linear, kept=kept, kept_recomputed=kept)
    inner, drawn = flow.width or width, rows * flow.draws

    def flops(*outside: str) -> float:
        chosen = (weight for weight in weights if not weight.name.startswith(outside))
        return linear_flops(chosen, lambda name: rows if name == "condition" else drawn)

    linear, inputs = flops(), 2 * shapes.FREQUENCIES
    ends = byte * rows * width + drawn * (byte * (width + FLOW_ENDS * inner + inputs) + 4 * width)
    return Part(
        "head",
        "trained",
        own,
        linear,
        0.0,
        returned_linear=(linear + flops("noisy.", "level.")) / 2,  # the inputs of these need no gradient
        kept=ends + drawn * flow.layers * FLOW_KEPT * inner * byte,
        kept_recomputed=ends + drawn * flow.layers * inner * byte,
        layer=drawn * FLOW_KEPT * inner * byte,
        last=flops("blocks."),
    )


def vision_encoder_part(config: Any, image_size: int, place: str) -> Part:
    """Qwen's vision encoder on a square image: windowed attention in most layers, full attention in a few."""
    vision = list(shapes.vision_encoder(config))
    side = image_size // config.patch_size
    patches = side * side
    window = config.window_size // config.patch_size
    edges = [window] * (side // window) + ([side % window] if side % window else [])
    pairs = len(config.fullatt_block_indexes) * patches**2
    pairs += (config.depth - len(config.fullatt_block_indexes)) * sum(edge**2 for edge in edges) ** 2

    def count(name: str) -> float:
        return patches / config.spatial_merge_size**2 if name.startswith("merger") else patches

    return Part(
        "vision encoder", "none", sizes(vision), linear_flops(vision, count), 4.0 * pairs * config.hidden_size, place
    )
