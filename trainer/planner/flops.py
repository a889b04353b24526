"""FLOPs per sample of each part: linear layers counted from the modules, attention from its mask.

A FLOP is half a multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..models.flux import FluxFolder, FluxTokenizers
from ..stages import Stage
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage, grid_side, hidden_counts

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
FLUX_STATISTICS = 3
"""Values in fp32 per token and head: the scales of queries and keys, and the logarithm of attention's sum."""


@dataclass(frozen=True)
class Part:
    """One part of the model: its parameters and its cost per sample.

    parameters: elements of every parameter, in order. linear, attention: FLOPs of the forward pass. returned_linear,
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


def count_parts(stage: Stage, precision: str, text_tokens: float) -> list[Part]:
    """The parts of a stage's model for prompts of `text_tokens` tokens (stage 1; FLUX pads its text). precision: `bf16`
    or `fp32`; stage: opened for counting."""
    with torch.device("meta"):
        model = stage.build()
    if isinstance(stage, PatchLatentStage):
        return patch_latent_parts(stage, model, precision, text_tokens)
    assert isinstance(stage, ControlNetStage)
    return _controlnet(stage, model, precision)


def linear_flops(module: nn.Module, count: Count) -> float:
    """FLOPs of all linear layers and convolutions in `module`."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d)
    return sum(2.0 * m.weight.numel() * count(name) for name, m in module.named_modules() if isinstance(m, kinds))


def sizes(module: nn.Module) -> tuple[int, ...]:
    return tuple(p.numel() for p in module.parameters())


def patch_latent_parts(stage: PatchLatentStage, model: Any, precision: str, text: float) -> list[Part]:
    config = stage.config.text_config
    width, layers, patches = config.hidden_size, config.num_hidden_layers, stage.tokens_per_image
    keys = config.num_key_value_heads * (width // config.num_attention_heads)
    byte = 2 if precision == "bf16" else 4
    layer, recomputed = (
        byte * (patches * (hidden * width + mlp * config.intermediate_size) + key * keys * (patches + text))
        for hidden, mlp, key in (BRANCH_KEPT, BRANCH_RECOMPUTED)
    )
    constant = byte * (layers * 2 * keys * text + patches * width)  # the prefix, and the input of the final norm
    rows = float(patches)
    if stage.branch.loss_tokens == "masked":
        draws = np.arange(4096)
        counts = hidden_counts(stage.branch.mask_rate, stage.seed, np.zeros_like(draws), draws, patches)
        rows = float(counts.mean())
    linear = linear_flops(model.branch, lambda name: patches)
    attention = 4.0 * patches * (text + patches) * width * layers
    projection = linear_flops(model.head, lambda name: rows)

    def read(name: str) -> float:
        """Of the last layer, only keys and values are computed."""
        return text if not name.startswith(f"layers.{layers - 1}.") or name.endswith(("k_proj", "v_proj")) else 0.0

    return [
        _vision_encoder(model.backbone.vision, stage.config.vision_config, stage.image_size, stage.backbone.placement),
        Part(
            "text prefix",
            "none",
            sizes(model.backbone.text),
            linear_flops(model.backbone.text, read),
            2.0 * text * text * width * (layers - 1),
            stage.backbone.placement,
        ),
        Part(
            "generation branch",
            "trained",
            sizes(model.branch),
            linear,
            attention,
            returned_linear=linear,
            returned_attention=attention,
            kept=layers * layer + constant,
            kept_recomputed=layers * byte * patches * width + constant,
            layer=recomputed,
            gradients=byte * patches * (3 * config.intermediate_size + width),
            last=linear_flops(model.branch, lambda name: patches if name.endswith("down_proj") else 0.0),
        ),
        Part(
            "head",
            "trained",
            sizes(model.head),
            projection,
            0.0,
            returned_linear=projection,
            kept=rows * width * (byte + 4),
            kept_recomputed=rows * width * (byte + 4),
        ),
    ]


def _vision_encoder(vision: nn.Module, config: Any, image_size: int, place: str) -> Part:
    """Qwen's vision encoder on a square image: windowed attention in most layers, full attention in a few."""
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


def _controlnet(stage: ControlNetStage, model: Any, precision: str) -> list[Part]:
    flux, folder, placement = model.flux, stage.folder, stage.flux.placement
    latents = grid_side(stage.config, stage.data.image_size) ** 2
    return [
        _vision_encoder(
            model.backbone.vision, stage.config.vision_config, stage.data.image_size, placement.vision_encoder
        ),
        _vae(flux.vae, stage.latents[1], placement.vae),
        *_text(flux, folder, placement.text),
        *_flow(flux.transformer, model.controlnet, stage, precision, latents, text_lengths(folder)[0]),
    ]


def text_lengths(folder: FluxFolder) -> tuple[int, int]:
    """Tokens of T5 and CLIP; for published models known without their tokenizers."""
    if (folder.path / "tokenizer_2").is_dir():
        tokenizers = FluxTokenizers(folder)
        return tokenizers.t5_length, tokenizers.clip_length
    return 512 if folder.guided else 256, min(77, folder.clip.max_position_embeddings)


def _vae(vae: nn.Module, side: int, place: str) -> Part:
    """The encoder, whose blocks halve the sides down to `side`; the decoder is stored but not run."""
    encoder: Any = vae.encoder
    blocks = len(encoder.down_blocks)

    def count(name: str) -> float:
        level = 0 if name == "conv_in" else blocks - 1
        if name.startswith("down_blocks"):
            block = int(name.split(".")[1])
            level = block + ("downsamplers" in name)
        return float(side * 2 ** (blocks - 1 - level)) ** 2

    attention = 4.0 * side**4 * encoder.conv_norm_out.num_channels
    return Part("VAE encoder", "none", sizes(vae), linear_flops(encoder, count), attention, place)


def _text(flux: Any, folder: FluxFolder, place: str) -> list[Part]:
    t5, clip = text_lengths(folder)
    settings, other = folder.t5, folder.clip
    joint = 4.0 * t5 * t5 * settings.num_heads * settings.d_kv * settings.num_layers
    causal = 2.0 * clip * clip * other.hidden_size * other.num_hidden_layers
    encoders = ((flux.text_encoder_2, "T5", t5, joint), (flux.text_encoder, "CLIP", clip, causal))
    return [
        Part(name, "none", sizes(module), linear_flops(module, lambda _, tokens=tokens: tokens), attention, place)
        for module, name, tokens, attention in encoders
    ]


def _flow(
    transformer: Any, controlnet: Any, stage: ControlNetStage, precision: str, latents: int, text: int
) -> list[Part]:
    """FLUX and its ControlNet: joint attention over image and text."""
    image = stage.folder.grid(stage.flux.image_size) ** 2
    width, heads = transformer.inner_dim, transformer.config.num_attention_heads
    byte = 2 if precision == "bf16" else 4
    tokens = image + text

    def part(name: str, module: Any, gradient: Gradient, place: str) -> Part:
        double, single = len(module.transformer_blocks), len(module.single_transformer_blocks)
        last = f"single_transformer_blocks.{single - 1}."
        # Gradients stop at the first residual.
        skipped = (1, 0) if stage.shape.double else (double, 1)
        behind = (double, single) if gradient == "trained" else (double - skipped[0], single - skipped[1])

        def count(name: str) -> float:
            if "norm" in name or name.startswith("time_text_embed"):
                return 1.0  # modulations: once per sample
            if name.startswith(last) and name.endswith(("to_q", "proj_mlp", "proj_out")):
                return image  # its text output is not used
            if name.startswith("single_transformer_blocks"):
                return tokens
            if any(word in name for word in ("context", "attn.add_", "attn.to_add")):
                return text
            return latents if name.endswith("upconv") else image

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
            return 4.0 * pairs * width

        forward = linear_flops(module, count), attention((double, single))
        unit, statistics = byte * width, 4 * FLUX_STATISTICS * heads
        kept = sum(n * tokens * (k * unit + statistics) for n, k in zip(behind, FLUX_KEPT[gradient], strict=True))
        if behind[1]:
            kept -= text * unit * (FLUX_KEPT[gradient][1] - FLUX_KEPT_BY_TEXT[gradient])
        # The rotation, complex, and the last state, for the layer behind the blocks.
        outside = 4.0 * tokens * width / heads + image * unit
        recomputed = sum(behind) * tokens * unit
        if gradient == "trained":  # inputs and the resampling block's states
            states = latents + 3 * image if stage.shape.resampling != "none" else 0
            outside += byte * states * stage.shape.latent_width
            inputs = image * stage.shape.latent_width + text * controlnet.config.joint_attention_dim
            outside += byte * (inputs + image * controlnet.config.in_channels)
            outside += image * unit if double and single else 0
        else:  # the loss's error, and the residuals, which blocks add
            outside += 4 * image * transformer.config.in_channels
            recomputed += (stage.shape.double + stage.shape.single) * image * unit
        return Part(
            name,
            gradient,
            sizes(module),
            *forward,
            place,
            linear_flops(module, reached),
            attention(behind),
            kept=kept + outside,
            kept_recomputed=recomputed + outside,
            layer=tokens * unit * FLUX_RECOMPUTED[gradient][0 if behind[0] else 1],
            gradients=5.0 * tokens * unit,
            last=sum(forward) - linear_flops(module, again) - attention(behind),
        )

    return [
        part("FLUX", transformer, "through", stage.flux.placement.transformer),
        part("ControlNet", controlnet, "trained", "sharded"),
    ]
