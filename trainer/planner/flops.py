"""FLOPs per sample of each part: linear layers counted from their shapes, attention from its mask.

A FLOP is half a multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..models.backbone_config import grid_side
from ..models.flux_config import FluxConfig
from ..models.masking import hidden_counts
from . import flux_shapes, shapes
from .opened import LatentControl, PatchLatents
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
FLUX_KEPT = {"through": (10, 9), "trained": (14, 11)}
"""Double and single block, times FLUX's hidden width; see models/flux_blocks.py. A trained block also keeps the inputs
of its linear layers and the changes that its gates scale."""
FLUX_KEPT_BY_TEXT = {"through": 3, "trained": 4}
"""The same of the last single block's text tokens, of which only keys and values are computed."""
FLUX_RECOMPUTED = {"through": (12, 11), "trained": (16, 13)}
"""The same for a block during its recomputation: with the rotated queries and keys."""
FLUX_SHARED = ("up_sampling_block", "down_sampling_block", "controlnet_x_embedder")
"""Layers of a ControlNet that read only patch latents: once for all draws of a sample."""
FLUX_STATISTICS = 3
"""Values in fp32 per token and head: the scales of queries and keys, and the logarithm of attention's sum."""


@dataclass(frozen=True)
class Part:
    """One part of the model: its parameters and its cost per sample.

    parameters: elements of every parameter, in order; widths: bytes of an element of each, None for those of the run's
    precision, empty if all are. linear, attention: FLOPs of the forward pass. returned_linear,
    returned_attention: the portion that gradients flow back through. kept: bytes saved by autograd; kept_recomputed:
    the same with every layer recomputed; layer: bytes of the layer being recomputed; gradients: bytes of activation
    gradients in flight. last: FLOPs at the end of the layers whose results are not saved: recomputation stops before
    them. place: as in recipes' `Placement`.
    """

    name: str
    gradient: Gradient
    parameters: tuple[int, ...]
    linear: float
    attention: float
    place: str = "sharded"
    returned_linear: float = 0.0
    returned_attention: float = 0.0
    kept: float = 0.0
    kept_recomputed: float = 0.0
    layer: float = 0.0
    gradients: float = 0.0
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
        """2 FLOPs per weight and token for the input gradient, and 2 more for the gradient of a trained weight."""
        products = {"none": 0, "through": 1, "trained": 2}[self.gradient]
        return products * self.returned_linear + self.backward_attention

    @property
    def backward_attention(self) -> float:
        return ATTENTION_BACKWARD * self.returned_attention

    @property
    def recomputed(self) -> float:
        """FLOPs of the second forward pass of recomputed layers; only with activation checkpointing."""
        return self.forward - self.last if self.layer else 0.0


def count_parts(model: PatchLatents | LatentControl, precision: str, text_tokens: float) -> list[Part]:
    """The parts of a stage's model for prompts of `text_tokens` tokens (stage 1; FLUX pads its text). precision: `bf16`
    or `fp32`."""
    if isinstance(model, PatchLatents):
        return patch_latent_parts(model, precision, text_tokens)
    return _controlnet(model, precision)


def linear_flops(weights: Iterable[Weight], count: Count) -> float:
    """FLOPs of all linear layers and convolutions among `weights`."""
    return sum(2.0 * w.size * count(w.name.removesuffix(".weight")) for w in weights if w.product)


def sizes(weights: Iterable[Weight]) -> tuple[int, ...]:
    return tuple(weight.size for weight in weights)


def widths(weights: Iterable[Weight]) -> tuple[int | None, ...]:
    return tuple(weight.width for weight in weights)


def patch_latent_parts(model: PatchLatents, precision: str, text: float) -> list[Part]:
    """Stage 1's parts; see `count_parts`."""
    config, side = model.config.text_config, grid_side(model.config, model.image_size)
    width, layers, patches = config.hidden_size, config.num_hidden_layers, side * side
    prefix, head = list(shapes.text_model(config, model.backbone.weights)), list(shapes.head(width))
    branch = list(shapes.branch(config, side, model.branch.positions == "learned"))
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    byte = 2 if precision == "bf16" else 4
    draws, placement = model.branch.draws, model.backbone.placement
    drawn = draws * patches
    layer, recomputed = (
        draws * byte * (patches * (hidden * width + mlp * config.intermediate_size) + key * keys * (patches + text))
        for hidden, mlp, key in (BRANCH_KEPT, BRANCH_RECOMPUTED)
    )
    constant = byte * (layers * 2 * keys * text + drawn * width)  # the prefix, and the input of the final norm
    rows = float(drawn)
    if model.branch.loss_tokens == "masked":
        samples = np.arange(4096)
        counts = hidden_counts(model.branch.mask_rate, model.seed, np.zeros_like(samples), samples, patches)
        rows = draws * float(counts.mean())
    linear = linear_flops(branch, lambda name: drawn)
    attention = 4.0 * drawn * (text + patches) * width * layers
    projection = linear_flops(head, lambda name: rows)

    def read(name: str) -> float:
        """Of the last layer, only keys and values are computed."""
        return text if not name.startswith(f"layers.{layers - 1}.") or name.endswith(("k_proj", "v_proj")) else 0.0

    return [
        _vision_encoder(model.config.vision_config, model.image_size, model.backbone.vision_encoder or placement),
        Part(
            "text prefix",
            "none",
            sizes(prefix),
            linear_flops(prefix, read),
            2.0 * text * text * width * (layers - 1),
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
            kept=layers * layer + constant,
            kept_recomputed=layers * byte * drawn * width + constant,
            layer=recomputed,
            gradients=byte * drawn * (3 * config.intermediate_size + width),
            last=linear_flops(branch, lambda name: drawn if name.endswith("down_proj") else 0.0),
        ),
        Part(
            "head",
            "trained",
            sizes(head),
            projection,
            0.0,
            returned_linear=projection,
            kept=rows * width * (byte + 4),
            kept_recomputed=rows * width * (byte + 4),
        ),
    ]


def _vision_encoder(config: Any, image_size: int, place: str) -> Part:
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


def _controlnet(model: LatentControl, precision: str) -> list[Part]:
    folder, placement = model.folder, model.flux.placement
    side = 2 * folder.grid(model.flux.image_size)
    # Predicted latents are those of a cache.
    vision = "cached" if model.latents == "predicted" else placement.vision_encoder
    return [
        _vision_encoder(model.config.vision_config, model.image_size, vision),
        _vae(folder, side, placement.vae),
        *_text(folder, placement.text),
        *_flow(model, precision),
    ]


def _vae(folder: FluxConfig, side: int, place: str) -> Part:
    """The encoder, whose blocks halve the sides down to `side`; the decoder is stored but not run."""
    widths = folder.vae["block_out_channels"]
    blocks = len(widths)

    def count(name: str) -> float:
        level = 0 if name == "conv_in" else blocks - 1
        if name.startswith("down_blocks"):
            block = int(name.split(".")[1])
            level = block + ("downsamplers" in name)
        return float(side * 2 ** (blocks - 1 - level)) ** 2

    attention = 4.0 * side**4 * widths[-1]
    linear = linear_flops(flux_shapes.vae_encoder(folder), count)
    return Part("VAE encoder", "none", sizes(flux_shapes.vae(folder)), linear, attention, place)


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


def _flow(model: LatentControl, precision: str) -> list[Part]:
    """FLUX and its ControlNet: joint attention over image and text, for every draw of noise."""
    settings, shape, draws = model.folder.transformer, model.shape, model.flux.draws
    latents = grid_side(model.config, model.image_size) ** 2
    image, text = model.folder.grid(model.flux.image_size) ** 2, model.folder.text_lengths[0]
    width, heads = flux_shapes.hidden_width(settings), flux_shapes.heads(settings)
    byte = 2 if precision == "bf16" else 4
    tokens = image + text

    def part(name: str, weights: Sequence[Weight], blocks: tuple[int, int], gradient: Gradient, place: str) -> Part:
        double, single = blocks
        last = f"single_transformer_blocks.{single - 1}."
        # Gradients stop at the first residual.
        skipped = (1, 0) if shape.double else (double, 1)
        behind = (double, single) if gradient == "trained" else (double - skipped[0], single - skipped[1])

        def count(name: str) -> float:
            if name.startswith(FLUX_SHARED):
                return latents if name.endswith("upconv") else image
            if "norm" in name or name.startswith("time_text_embed"):
                return draws  # modulations: not per token
            if name.startswith(last) and name.endswith(("to_q", "proj_mlp", "proj_out")):
                return draws * image  # its text output is not used
            if name.startswith("single_transformer_blocks"):
                return draws * tokens
            return draws * (text if any(word in name for word in ("context", "attn.add_", "attn.to_add")) else image)

        def reached(name: str) -> float:
            kind, _, rest = name.partition(".")
            number = int(rest.split(".")[0]) if kind.endswith("transformer_blocks") else 0
            first = {"transformer_blocks": skipped[0], "single_transformer_blocks": skipped[1], "proj_out": 0}
            return count(name) if gradient == "trained" or number >= first.get(kind, 1) else 0.0

        def again(name: str) -> float:
            """Recomputed: a frozen block only up to the image's last layer, whose result is not saved."""
            if gradient == "through" and name.endswith(("ff.net.2", "proj_out")):
                return 0.0
            return reached(name) if "transformer_blocks" in name else 0.0

        def attention(blocks: tuple[int, int]) -> float:
            pairs = sum(blocks) * tokens**2 - (text * tokens if blocks[1] else 0)
            return 4.0 * draws * pairs * width

        forward = linear_flops(weights, count), attention((double, single))
        unit, statistics = byte * width, 4 * FLUX_STATISTICS * heads
        kept = sum(n * tokens * (k * unit + statistics) for n, k in zip(behind, FLUX_KEPT[gradient], strict=True))
        if behind[1]:
            kept -= text * unit * (FLUX_KEPT[gradient][1] - FLUX_KEPT_BY_TEXT[gradient])
        shared = 4.0 * tokens * width / heads  # the rotation, complex
        outside = image * unit  # the last state, for the layer behind the blocks
        recomputed = sum(behind) * tokens * unit
        if gradient == "trained":  # inputs and the resampling block's states
            states = latents + 3 * image if shape.resampling != "none" else 0
            shared += byte * (states + image) * shape.latent_width
            outside += byte * (image * settings["in_channels"] + text * settings["joint_attention_dim"])
            outside += image * unit if double and single else 0
        else:  # the loss's error, and the residuals, which blocks add
            outside += 4 * image * settings["in_channels"]
            recomputed += (shape.double + shape.single) * image * unit
        return Part(
            name,
            gradient,
            sizes(weights),
            *forward,
            place,
            linear_flops(weights, reached),
            attention(behind),
            kept=draws * (kept + outside) + shared,
            kept_recomputed=draws * (recomputed + outside) + shared,
            layer=draws * tokens * unit * FLUX_RECOMPUTED[gradient][0 if behind[0] else 1],
            gradients=5.0 * draws * tokens * unit,
            last=sum(forward) - linear_flops(weights, again) - attention(behind),
            widths=widths(weights),
        )

    flux, control = list(flux_shapes.flux_part(model.folder, "transformer")), list(flux_shapes.controlnet(shape))
    return [
        part("FLUX", flux, model.folder.blocks, "through", model.flux.placement.transformer),
        part("ControlNet", control, (shape.double, shape.single), "trained", "sharded"),
    ]
