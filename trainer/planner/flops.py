"""FLOPs per sample of stage 1's parts and of image encoders: linear layers counted from their shapes, attention from
its mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...recipes.branch import Branch, Lora
from ..models.backbone_config import branch_layers
from ..models.flux_config import FluxConfig
from ..models.image_grids import Grid
from ..models.masking import hidden_counts
from ..optim.rules import rule_name
from . import flux_shapes, shapes
from .opened import PatchLatents
from .part import Part
from .shapes import Weight

Count = Callable[[str], float]
"""Module name -> number of times its weight is applied per sample."""

# Elements saved by autograd per token and layer, in units of the widths; planner/test_flops.py measures them.
BRANCH_KEPT = (6, 2, 2)
"""Decoder layer: times hidden width, MLP width, key width (the last for text rows too)."""
BRANCH_RECOMPUTED = (6, 4, 2)
"""The same for a layer during its recomputation."""
FLOW_KEPT, FLOW_ENDS = 10, 6
"""A block of a flow head per noise draw, and what is outside of its blocks, times the head's width."""


def linear_flops(weights: Iterable[Weight], count: Count) -> float:
    """FLOPs of all linear layers and convolutions among `weights`."""
    return sum(2.0 * w.size * count(w.name.removesuffix(".weight")) for w in weights if w.product)


def sizes(weights: Iterable[Weight]) -> tuple[int, ...]:
    return tuple(weight.size for weight in weights)


def widths(weights: Iterable[Weight]) -> tuple[int | None, ...]:
    return tuple(weight.width for weight in weights)


def matrices(weights: Iterable[Weight]) -> tuple[tuple[int, int], ...]:
    """Shapes of those that Muon would update."""
    shapes = (weight.shape for weight in weights if rule_name("muon", weight.name, weight.shape) == "muon")
    return tuple((rows, columns) for rows, columns in shapes)


def head_weight(config: Any) -> int:
    """Elements of the text model's output layer. config: as in `PatchLatents`."""
    return config.text_config.vocab_size * config.text_config.hidden_size


def patch_latent_parts(
    model: PatchLatents,
    precision: str,
    text: float,
    longest: float | None = None,
    grid: Grid | None = None,
    edited: bool = False,
) -> list[Part]:
    """Stage 1's parts: FLOPs for prompts of `text` tokens, bytes for prompts of `longest`, by default the most that the
    recipe lets through. precision: `bf16` or `fp32`. grid: of the patches; None: the square. edited: with a source
    image in each prompt, in addition."""
    longest = model.branch.max_text_tokens if longest is None else longest
    grid = grid or model.square.latents
    config, patches = model.config.text_config, math.prod(grid)
    if edited:
        text, longest = text + patches, longest + patches
    width, last = config.hidden_size, config.num_hidden_layers - 1
    prefix, head = list(shapes.text_model(config, model.backbone.weights)), list(shapes.head(width, model.branch))
    byte = 2 if precision == "bf16" else 4
    draws, placement = model.branch.draws, model.backbone.placement
    rows = float(draws * patches)
    if model.branch.loss_tokens == "masked":
        samples = np.arange(4096)
        counts = hidden_counts(model.branch.mask_rate, model.seed, np.zeros_like(samples), samples, patches)
        rows = draws * float(counts.mean())

    def read(name: str) -> float:
        """Of the last layer, only keys and values are computed."""
        return text if not name.startswith(f"layers.{last}.") or name.endswith(("k_proj", "v_proj")) else 0.0

    targets = _targets(model, byte, grid)
    if edited:  # the vision encoder has two images per sample
        both = {name: 2 * getattr(targets, name) for name in ("linear", "attention", "in_use")}
        targets = replace(targets, **both)
    return [
        targets,
        Part(
            "text prefix",
            "none",
            sizes(prefix),
            linear_flops(prefix, read),
            2.0 * text * text * width * last,
            placement,
            widths=widths(prefix),
        ),
        *([Part("language head", "none", (head_weight(model.config),), 0.0, 0.0, placement)] if model.texts else []),
        *_branch(model, byte, grid, text, longest),
        head_part(head, model.branch, width, rows, byte),
    ]


def _targets(model: PatchLatents, byte: int, grid: Grid) -> Part:
    """What makes the targets: the vision encoder, or linear functions of pixels or of another encoder's latents, whose
    basis is a buffer, of squares. byte: of an activation's element. grid: of the patches."""
    place = model.backbone.vision_encoder or model.backbone.placement
    if model.branch.targets == "native":
        return vision_encoder_part(model.config.vision_config, grid, place, byte)
    projected = 2.0 * model.config.text_config.hidden_size  # FLOPs per value
    if model.vae:
        assert model.flux is not None
        side = 2 * model.vae.grid(model.flux.image_size)
        encoder, values = vae_encoder_part(model.vae, (side, side), place), model.vae.vae["latent_channels"] * side**2
        return replace(encoder, linear=encoder.linear + projected * values)
    if model.encoder:
        vision = model.encoder.vision_config
        encoder = vision_encoder_part(vision, grid, place, byte)
        values = math.prod(grid) * vision.out_hidden_size
        return replace(encoder, linear=encoder.linear + projected * values)
    return Part("pixel targets", "none", (), projected * 3 * model.image_size**2, 0.0, "replicated")


def _branch(model: PatchLatents, byte: int, grid: Grid, text: float, longest: float) -> list[Part]:
    """The trained layers, and the frozen ones that they share. byte: of an activation's element. grid: of the
    patches."""
    config, (side, _) = model.config.text_config, model.square.latents
    width, mlp, patches = config.hidden_size, config.intermediate_size, math.prod(grid)
    layers = len(branch_layers(model.config, model.branch.layers))
    branch = list(shapes.branch(config, side, model.branch))
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    draws, drawn = model.branch.draws, model.branch.draws * patches
    lora = model.branch.lora if model.branch.weights == "lora" else None
    layer, recomputed = (
        draws * byte * (patches * (inner * width + inners * mlp + pairs) + key * keys * (patches + longest))
        for inner, inners, key, pairs in (low_rank_kept(lora) if lora else ((*BRANCH_KEPT, 0), (*BRANCH_RECOMPUTED, 0)))
    )
    normed = byte * drawn * width  # the input of the final norm
    read_again = byte * layers * 2 * keys * longest  # the prefix, which a layer copies, and reads again if recomputed
    linear = linear_flops(branch, lambda name: drawn)
    attention = 4.0 * drawn * (text + patches) * width * layers
    flight = byte * drawn * (3 * mlp + width)
    own = Part(
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
        gradients=flight,
        gradients_recomputed=flight if lora else byte * drawn * (mlp + 2 * width),  # torch's own SwiGLU
        last=linear_flops(branch, lambda name: drawn if name.endswith("down_proj") else 0.0),
        matrices=matrices(branch),
    )
    return [own, _shared(model, drawn, recomputed)] if lora else [own]


def low_rank_kept(lora: Lora) -> tuple[tuple[int, int, int, int], ...]:
    """As `BRANCH_KEPT` and `BRANCH_RECOMPUTED` for a layer with low-rank pairs, and the elements that the pairs keep. A
    layer without a pair needs no input, but attention keeps that of the output projection itself."""
    unread = sum(not names & set(lora.targets) for names in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}))
    hidden, mlp, key = BRANCH_KEPT
    found = hidden - unread, mlp, key, lora.rank * len(set(lora.targets))
    return found, found


def _shared(model: PatchLatents, drawn: int, layer: float) -> Part:
    """The frozen text layers as the branch uses them. drawn: patches of all masks; layer: bytes, as in `Part`."""
    config, held = model.config.text_config, model.backbone.weights
    weights = list(shapes.shared_layers(config, held, branch_layers(model.config, model.branch.layers)))
    linear = linear_flops(weights, lambda name: drawn)
    return Part(
        "text layers in the branch",
        "through",
        sizes(weights),
        linear,
        0.0,
        model.backbone.placement,
        returned_linear=linear,
        layer=layer,
        last=linear_flops(weights, lambda name: drawn if name.endswith("down_proj") else 0.0),
        widths=widths(weights),
        shared=True,
    )


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
        matrices=matrices(weights),
    )


def vision_encoder_part(config: Any, grid: Grid, place: str, byte: int) -> Part:
    """Qwen's vision encoder on an image of `grid` rows and columns of latents: windowed attention in most layers, full
    attention in a few. byte: of an activation's element."""
    vision = list(shapes.vision_encoder(config))
    rows, columns = (config.spatial_merge_size * side for side in grid)
    patches = rows * columns
    window = config.window_size // config.patch_size

    def pairs_along(side: int) -> int:
        """Pairs of patches in the same window along one side."""
        return side // window * window**2 + (side % window) ** 2

    pairs = len(config.fullatt_block_indexes) * patches**2
    pairs += (config.depth - len(config.fullatt_block_indexes)) * pairs_along(rows) * pairs_along(columns)

    def count(name: str) -> float:
        return patches / config.spatial_merge_size**2 if name.startswith("merger") else patches

    width, pixels = config.hidden_size, config.in_channels * config.temporal_patch_size * config.patch_size**2
    # At its most in the rotation of queries and keys, in fp32, next to the layer's input, the normed one, and queries,
    # keys and values; and the pixels, in fp32 and as they are read.
    rotated = 4 * (6 if byte < 4 else 4)
    return Part(
        "vision encoder",
        "none",
        sizes(vision),
        linear_flops(vision, count),
        4.0 * pairs * width,
        place,
        in_use=patches * (width * (5 * byte + rotated) + pixels * (4 + byte)),
    )


def vae_encoder_part(folder: FluxConfig, sides: tuple[int, int], place: str) -> Part:
    """The encoder, whose blocks halve height and width down to `sides`; the decoder is stored but not run."""
    latents = sides[0] * sides[1]
    widths = folder.vae["block_out_channels"]
    blocks = len(widths)

    def count(name: str) -> float:
        level = 0 if name == "conv_in" else blocks - 1
        if name.startswith("down_blocks"):
            block = int(name.split(".")[1])
            level = block + ("downsamplers" in name)
        return float(latents * 4 ** (blocks - 1 - level))

    attention = 4.0 * latents**2 * widths[-1] if folder.vae.get("mid_block_add_attention", True) else 0.0
    linear = linear_flops(flux_shapes.vae_encoder(folder), count)
    return Part("VAE encoder", "none", sizes(flux_shapes.vae(folder)), linear, attention, place)
