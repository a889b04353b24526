"""FLOPs and activations per sample of stage 2's parts; see `flops`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...recipes.stage2 import ControlLora, FluxLayer
from ..models.controlnet_config import ControlNetConfig
from ..models.flux_config import FluxConfig
from ..models.image_grids import ImageGrid
from ..models.text_bridge_config import TextBridgeConfig
from . import bridge_flops, flux_shapes
from .flops import linear_flops, matrices, sizes, vae_encoder_part, vision_encoder_part, widths
from .opened import LatentControl
from .part import Part
from .shapes import Weight

# Elements saved by autograd per token, in units of FLUX's hidden width; planner/test_flops.py measures them.
FLUX_KEPT = (10, 9)
"""Frozen double and single block; see models/flux_blocks.py and `_Stack.units`."""
FLUX_KEPT_BY_TEXT = 3
"""The same of the last single block's text tokens, of which only keys and values are computed."""
FLUX_RECOMPUTED = (12, 11)
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


def controlnet_parts(model: LatentControl, precision: str, grid: ImageGrid) -> list[Part]:
    """Stage 2's parts on images of `grid`. precision: `bf16` or `fp32`."""
    folder, placement = model.folder, model.flux.placement
    rows, columns = grid.tokens
    byte = 2 if precision == "bf16" else 4
    flux = tuple(flux_shapes.flux_part(folder, "transformer"))
    # Predicted latents are those of a cache.
    vision = "cached" if model.latents == "predicted" else placement.vision_encoder
    return [
        vision_encoder_part(model.config.vision_config, grid.latents, vision, byte),
        vae_encoder_part(folder, (2 * rows, 2 * columns), placement.vae),
        *_text(folder, placement.text),
        _Stack(model, grid, byte, "through", flux, *folder.blocks).part("FLUX", placement.transformer),
        *_bridge(model, grid, byte),
    ]


def _bridge(model: LatentControl, grid: ImageGrid, byte: int) -> list[Part]:
    """What is trained, and the frozen layers of FLUX that it shares."""
    shape = model.shape
    if isinstance(shape, TextBridgeConfig):
        return [bridge_flops.part(shape, byte)]
    blocks = shape.double, shape.single
    own = _Stack(model, grid, byte, "trained", tuple(flux_shapes.controlnet(shape)), *blocks)
    if not shape.lora:
        return [own.part("ControlNet", "sharded")]
    weights = tuple(flux_shapes.shared_with_flux(shape, model.flux.weights))
    shared = _Stack(model, grid, byte, "trained", weights, *blocks)
    return [own.part("ControlNet", "sharded"), shared.shared(model.flux.placement.transformer)]


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
    grid: ImageGrid
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
        return math.prod(self.grid.latents)

    @property
    def image(self) -> int:
        """Tokens of the image."""
        return math.prod(self.grid.tokens)

    @property
    def control(self) -> ControlNetConfig | None:
        """The ControlNet, if the model has one."""
        return self.model.shape if isinstance(self.model.shape, ControlNetConfig) else None

    @property
    def lora(self) -> ControlLora | None:
        """The low-rank pairs, of a ControlNet that has some."""
        return self.control.lora if self.trained and self.control else None

    def targets(self, *kinds: FluxLayer) -> bool:
        """Whether one of these kinds of layers is trained."""
        return self.trained and (self.lora is None or any(kind in self.lora.targets for kind in kinds))

    @property
    def gated(self) -> bool:
        """Whether the modulation needs a gradient."""
        return self.targets("modulation", "embedders")

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
        """Times that a layer, or a factor of its pair, is applied per sample."""
        name = _layer(name)
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
        if not self.trained or not self.control or name.endswith("lora_B"):
            return 0.0
        return self.count(name) if self.reads_inputs(_layer(name)) else 0.0

    def reads_inputs(self, layer: str) -> bool:
        """Whether the input of a ControlNet's layer needs no gradient."""
        assert self.control
        reads = layer.startswith(FIRST_LAYERS[self.control.resampling]) or layer.endswith("embedder.linear_1")
        if self.lora is None:
            return reads
        of_text = layer.startswith("transformer_blocks.0.attn.add_") and not self.gated
        return reads or of_text or (_modulates(layer) and not self.targets("embedders"))

    def again(self, name: str) -> float:
        """The same of recomputed layers: a block with frozen gates only up to the image's last one, whose result is not
        saved."""
        if not self.gated and _layer(name).endswith(("ff.net.2", "proj_out")):
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
        each = (k * unit + statistics for k in self.units(FLUX_KEPT))
        kept = sum(blocks * self.tokens * bytes for blocks, bytes in zip(behind, each, strict=True))
        if behind[1]:
            by_text = FLUX_KEPT_BY_TEXT + self.targets("attention", "mlp")
            kept -= self.text * unit * (self.units(FLUX_KEPT)[1] - by_text)
        shared = 0.0
        outside = self.image * unit  # the last state, for the layer behind the blocks
        recomputed = sum(behind) * self.tokens * unit
        if self.trained and shape:  # inputs and the resampling block's states
            states = self.latents + 3 * self.image if shape.resampling != "none" else 0
            shared += self.byte * (states + self.image) * shape.latent_width
            if self.targets("embedders"):
                outside += self.byte * (
                    self.image * settings["in_channels"] + self.text * settings["joint_attention_dim"]
                )
            outside += self.image * unit if self.double and self.single else 0
        else:  # the loss's error, and the residuals, which blocks add
            outside += 4 * self.image * settings["in_channels"]
            recomputed += (shape.double + shape.single if shape else 0) * self.image * unit
        low = self.low() * self.byte  # counts the draws itself
        return self.draws * (kept + outside) + shared + low, self.draws * (recomputed + outside) + shared

    def low(self) -> float:
        """Elements that low-rank pairs keep of their layers' inputs, projected to the rank."""
        if self.lora is None:
            return 0.0
        return self.lora.rank * sum(self.count(w.name) for w in self.weights if w.name.endswith("lora_B"))

    def shared(self, place: str) -> Part:
        """FLUX's layers as a ControlNet with low-rank pairs uses them."""
        linear = linear_flops(self.weights, self.count)
        return Part(
            "FLUX's layers in the ControlNet",
            "through",
            sizes(self.weights),
            linear,
            0.0,
            place,
            returned_linear=linear_flops(self.weights, lambda name: 0 if self.reads_inputs(name) else self.count(name)),
            layer=self.draws * self.tokens * self.byte * self.width * self.units(FLUX_RECOMPUTED)[bool(self.single)],
            last=linear - linear_flops(self.weights, self.again),
            widths=widths(self.weights),
            shared=True,
        )

    def units(self, frozen: tuple[int, int]) -> tuple[int, int]:
        """What a token keeps in a double and a single block, from the same of `frozen` ones: a trained layer also keeps
        its input, which attention's projections have in common, and a trained gate the change that it scales."""
        double, single = frozen
        inputs = self.targets("attention") + self.targets("mlp"), self.targets("attention", "mlp")
        return double + inputs[0] + 2 * self.gated, single + inputs[1] + self.gated

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
            layer=state * self.units(FLUX_RECOMPUTED)[1 if self.behind[1] else 0],
            gradients=5.0 * state,
            gradients_recomputed=5.0 * state,
            last=linear + attention - linear_flops(self.weights, self.again) - returned,
            widths=widths(self.weights),
            matrices=matrices(self.weights) if self.trained else (),
        )


def _layer(name: str) -> str:
    """The layer that a factor of a pair belongs to."""
    return name.removesuffix(".lora_A").removesuffix(".lora_B")


def _modulates(name: str) -> bool:
    """Whether a layer reads the noise level, not tokens."""
    return "norm" in name or name.startswith("time_text_embed")
