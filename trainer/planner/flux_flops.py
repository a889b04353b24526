"""FLOPs and activations per sample of stage 2's parts; see `flops`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.backbone_config import grid_side
from ..models.controlnet_config import ControlNetConfig
from ..models.flux_config import FluxConfig
from ..models.text_bridge_config import TextBridgeConfig
from . import bridge_flops, flux_shapes
from .flops import linear_flops, matrices, sizes, vae_encoder_part, vision_encoder_part, widths
from .opened import LatentControl
from .part import Part
from .shapes import Weight

# Elements saved by autograd per token, in units of FLUX's hidden width; planner/test_flops.py measures them.
FLUX_KEPT = {"through": (10, 9), "trained": (14, 11)}
"""Double and single block; see models/flux_blocks.py. A trained block also keeps the inputs of its linear layers and
the changes that its gates scale."""
FLUX_KEPT_BY_TEXT = {"through": 3, "trained": 4}
"""The same of the last single block's text tokens, of which only keys and values are computed."""
FLUX_RECOMPUTED = {"through": (12, 11), "trained": (16, 13)}
"""The same for a block during its recomputation: with the rotated queries and keys."""
FLUX_SHARED = ("up_sampling_block", "down_sampling_block", "controlnet_x_embedder")
"""Layers of a ControlNet that read only patch latents: once for all draws of a sample."""
FIRST_LAYERS = {
    "up": ("x_embedder", "context_embedder", "up_sampling_block.upconv"),
    "down": ("x_embedder", "context_embedder", "down_sampling_block.downconv"),
    "none": ("x_embedder", "context_embedder", "controlnet_x_embedder"),
}
"""Resampling of a ControlNet -> layers that read its inputs, which need no gradient; in addition the first layers of
its embedders of noise level, guidance and pooled text."""
FLUX_STATISTICS = 3
"""Values in fp32 per token and head: the scales of queries and keys, and the logarithm of attention's sum."""


def controlnet_parts(model: LatentControl, precision: str) -> list[Part]:
    """Stage 2's parts. precision: `bf16` or `fp32`."""
    folder, placement = model.folder, model.flux.placement
    side = 2 * folder.grid(model.flux.image_size)
    byte = 2 if precision == "bf16" else 4
    flux = tuple(flux_shapes.flux_part(folder, "transformer"))
    # Predicted latents are those of a cache.
    vision = "cached" if model.latents == "predicted" else placement.vision_encoder
    return [
        vision_encoder_part(model.config.vision_config, model.image_size, vision, byte),
        vae_encoder_part(folder, side, placement.vae),
        *_text(folder, placement.text),
        _Stack(model, byte, "through", flux, *folder.blocks).part("FLUX", placement.transformer),
        _bridge(model, byte),
    ]


def _bridge(model: LatentControl, byte: int) -> Part:
    shape = model.shape
    if isinstance(shape, TextBridgeConfig):
        return bridge_flops.part(shape, byte)
    control = tuple(flux_shapes.controlnet(shape))
    return _Stack(model, byte, "trained", control, shape.double, shape.single).part("ControlNet", "sharded")


def _text(folder: FluxConfig, place: str) -> list[Part]:
    lengths = folder.text_lengths
    settings, other = folder.t5, folder.clip
    joint = 4.0 * lengths[0] ** 2 * settings.num_heads * settings.d_kv * settings.num_layers
    causal = 2.0 * lengths[1] ** 2 * other.hidden_size * other.num_hidden_layers
    encoders = ((flux_shapes.t5(settings), "T5", joint), (flux_shapes.clip(other), "CLIP", causal))
    found = []
    for (weights, name, attention), tokens in zip(encoders, lengths, strict=True):
        own = list(weights)
        found.append(Part(name, "none", sizes(own), linear_flops(own, lambda _, n=tokens: n), attention, place))
    return found


@dataclass(frozen=True)
class _Stack:
    """The blocks of FLUX or of its ControlNet with their embeddings: joint attention over image and text, for every
    draw of noise. byte: of an activation's element; double, single: blocks."""

    model: LatentControl
    byte: int
    gradient: Literal["through", "trained"]
    weights: tuple[Weight, ...]
    double: int
    single: int

    @property
    def trained(self) -> bool:
        return self.gradient == "trained"

    @property
    def draws(self) -> int:
        return self.model.flux.draws

    @property
    def latents(self) -> int:
        return grid_side(self.model.config, self.model.image_size) ** 2

    @property
    def image(self) -> int:
        """Tokens of the image."""
        return self.model.folder.grid(self.model.flux.image_size) ** 2

    @property
    def control(self) -> ControlNetConfig | None:
        """The ControlNet, if the model has one."""
        return self.model.shape if isinstance(self.model.shape, ControlNetConfig) else None

    @property
    def text(self) -> int:
        shape = self.model.shape
        return self.model.folder.text_lengths[0] + (0 if isinstance(shape, ControlNetConfig) else shape.tokens)

    @property
    def tokens(self) -> int:
        return self.image + self.text

    @property
    def width(self) -> int:
        return flux_shapes.hidden_width(self.model.folder.transformer)

    @property
    def skipped(self) -> tuple[int, int]:
        """Double and single blocks before the first residual, at which gradients stop; none before trained text."""
        if self.trained or not self.control:
            return 0, 0
        return (1, 0) if self.control.double else (self.double, 1)

    @property
    def behind(self) -> tuple[int, int]:
        """Double and single blocks that gradients pass through."""
        return self.double - self.skipped[0], self.single - self.skipped[1]

    def count(self, name: str) -> float:
        """Times that a layer is applied per sample."""
        if name.startswith(FLUX_SHARED):
            return self.latents if name.endswith("upconv") else self.image
        if _modulates(name):
            return self.draws
        if name.startswith(f"single_transformer_blocks.{self.single - 1}.") and name.endswith(
            ("to_q", "proj_mlp", "proj_out")
        ):
            return self.draws * self.image  # its text output is not used
        if name.startswith("single_transformer_blocks"):
            return self.draws * self.tokens
        of_text = any(word in name for word in ("context", "attn.add_", "attn.to_add"))
        return self.draws * (self.text if of_text else self.image)

    def passed(self, name: str) -> bool:
        """Whether gradients pass through a layer's block."""
        kind, _, rest = name.partition(".")
        number = int(rest.split(".")[0]) if kind.endswith("transformer_blocks") else 0
        first = {"transformer_blocks": self.skipped[0], "single_transformer_blocks": self.skipped[1], "proj_out": 0}
        if not self.control:
            first["context_embedder"] = 0
        return self.trained or number >= first.get(kind, 1)

    def reached(self, name: str) -> float:
        """The same of the layers that gradients pass through. In a frozen stack nothing trained changes a block's
        modulation, nor the text before the first block that gradients pass through; the image, if the text is
        trained."""
        first = f"transformer_blocks.{self.skipped[0]}.attn."
        before = (f"{first}add_",) if self.control else tuple(f"{first}to_{each}" for each in "qkv")
        untouched = _modulates(name) or name.startswith(before)
        return self.count(name) if self.passed(name) and (self.trained or not untouched) else 0.0

    def first(self, name: str) -> float:
        """The same of the trained layers whose inputs need no gradient."""
        if not self.trained or not self.control:
            return 0.0
        reads_inputs = name.startswith(FIRST_LAYERS[self.control.resampling]) or name.endswith("embedder.linear_1")
        return self.count(name) if reads_inputs else 0.0

    def again(self, name: str) -> float:
        """The same of recomputed layers: a frozen block only up to the image's last one, whose result is not saved."""
        if not self.trained and name.endswith(("ff.net.2", "proj_out")):
            return 0.0
        return self.count(name) if self.passed(name) and "transformer_blocks" in name else 0.0

    def attention(self, double: int, single: int) -> float:
        """FLOPs of attention in these blocks, the last ones."""
        pairs = (double + single) * self.tokens**2 - (self.text * self.tokens if single else 0)
        return 4.0 * self.draws * pairs * self.width

    def activations(self) -> tuple[float, float]:
        """Bytes that autograd keeps, without and with recomputation."""
        model, behind, unit = self.model, self.behind, self.byte * self.width
        heads, settings, shape = flux_shapes.heads(model.folder.transformer), model.folder.transformer, self.control
        statistics = 4 * FLUX_STATISTICS * heads
        each = (k * unit + statistics for k in FLUX_KEPT[self.gradient])
        kept = sum(blocks * self.tokens * bytes for blocks, bytes in zip(behind, each, strict=True))
        if behind[1]:
            kept -= self.text * unit * (FLUX_KEPT[self.gradient][1] - FLUX_KEPT_BY_TEXT[self.gradient])
        shared = 0.0
        outside = self.image * unit  # the last state, for the layer behind the blocks
        recomputed = sum(behind) * self.tokens * unit
        if self.trained and shape:  # inputs and the resampling block's states
            states = self.latents + 3 * self.image if shape.resampling != "none" else 0
            shared += self.byte * (states + self.image) * shape.latent_width
            outside += self.byte * (self.image * settings["in_channels"] + self.text * settings["joint_attention_dim"])
            outside += self.image * unit if self.double and self.single else 0
        else:  # the loss's error, and the residuals, which blocks add
            outside += 4 * self.image * settings["in_channels"]
            recomputed += (shape.double + shape.single if shape else 0) * self.image * unit
        return self.draws * (kept + outside) + shared, self.draws * (recomputed + outside) + shared

    def part(self, name: str, place: str) -> Part:
        linear, attention = linear_flops(self.weights, self.count), self.attention(self.double, self.single)
        state = self.draws * self.tokens * self.byte * self.width
        kept, kept_recomputed = self.activations()
        returned = self.attention(*self.behind)
        return Part(
            name,
            self.gradient,
            sizes(self.weights),
            linear,
            attention,
            place,
            returned_linear=linear_flops(self.weights, self.reached),
            returned_attention=returned,
            first=linear_flops(self.weights, self.first),
            kept=kept,
            kept_recomputed=kept_recomputed,
            kept_once=4.0 * self.tokens * self.width / flux_shapes.heads(self.model.folder.transformer),  # the rotation
            layer=state * FLUX_RECOMPUTED[self.gradient][1 if self.behind[1] else 0],
            gradients=5.0 * state,
            gradients_recomputed=5.0 * state,
            last=linear + attention - linear_flops(self.weights, self.again) - returned,
            widths=widths(self.weights),
            matrices=matrices(self.weights) if self.trained else (),
        )


def _modulates(name: str) -> bool:
    """Whether a layer reads the noise level, not tokens."""
    return "norm" in name or name.startswith("time_text_embed")
