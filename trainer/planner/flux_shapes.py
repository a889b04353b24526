"""Names and shapes of the parameters of FLUX's parts and of stage 2's bridges; see `shapes`.

Settings that a `config.json` omits have diffusers' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...recipes.fields import HeldWeights
from ...recipes.stage2 import ControlLora
from ..errors import RunError
from ..models.controlnet_config import ControlNetConfig, layer_kind
from ..models.flux_config import ClipConfig, FluxConfig, Part, T5Config
from ..models.text_bridge_config import MLP as CONNECTOR_MLP
from ..models.text_bridge_config import BridgeConfig, TextBridgeConfig
from .shapes import (
    Weight,
    Weights,
    convolution,
    embedding,
    in_eight_bits,
    linear,
    norm,
    repeated,
    transposed_convolution,
    within,
)

FREQUENCIES = 256
"""Width of the sinusoidal embedding of noise level and guidance."""
MLP = 4
"""Width of a block's MLP, in units of the hidden width."""


def flux_part(folder: FluxConfig, part: Part) -> Weights:
    """One part of a FLUX."""
    if part == "transformer":
        return transformer(folder.transformer, folder.held)
    if part == "vae":
        return vae(folder)
    return clip(folder.clip) if part == "text_encoder" else t5(folder.t5)


def heads(config: Mapping[str, Any]) -> int:
    """Attention heads of a FLUX transformer."""
    return config.get("num_attention_heads", 24)


def hidden_width(config: Mapping[str, Any]) -> int:
    """Hidden width of a FLUX transformer."""
    return heads(config) * config.get("attention_head_dim", 128)


def transformer(config: Mapping[str, Any], held: HeldWeights = "bf16") -> Weights:
    """FLUX's transformer. config: its `config.json`; held: see `FluxConfig`."""
    width = hidden_width(config)
    yield from _blocks(config, config["num_layers"], config["num_single_layers"], held)
    yield from linear("norm_out.linear", 2 * width, width)
    channels = config.get("out_channels") or config["in_channels"]
    yield from linear("proj_out", config.get("patch_size", 1) ** 2 * channels, width)


def bridge(shape: BridgeConfig) -> Weights:
    """What stage 2 trains: the latent ControlNet, or another bridge."""
    return text_bridge(shape) if isinstance(shape, TextBridgeConfig) else controlnet(shape)


def text_bridge(shape: TextBridgeConfig) -> Weights:
    """A bridge that gives FLUX additional text tokens."""
    if shape.connector is None:
        yield from linear("project", shape.text_width, shape.latent_width)
        return
    width = shape.width

    def block() -> Weights:
        for name in ("to_q", "to_k", "to_v", "to_out"):
            yield from linear(name, width, width)
        yield from linear("up", CONNECTOR_MLP * width, width)
        yield from linear("down", width, CONNECTOR_MLP * width)

    yield Weight("queries", (1, shape.tokens, width))
    yield Weight("positions", (1, shape.patches, width))
    yield from linear("latents", width, shape.latent_width)
    yield from repeated("blocks", shape.connector.layers, block)
    yield from linear("project", shape.text_width, width)


def controlnet(shape: ControlNetConfig) -> Weights:
    """The latent ControlNet."""
    width, latent = hidden_width(shape.flux), shape.latent_width
    copied = _blocks(shape.flux, shape.double, shape.single)
    yield from _with_pairs(copied, shape.lora) if shape.lora else copied
    for index in range(shape.double):
        yield from linear(f"controlnet_blocks.{index}", width, width)
    for index in range(shape.single):
        yield from linear(f"controlnet_single_blocks.{index}", width, width)
    yield from linear("controlnet_x_embedder", width, latent)
    if shape.resampling == "up":
        first = transposed_convolution("upconv", latent, latent, 2, 2)
    elif shape.resampling == "down":
        first = convolution("downconv", latent, latent, 2, 2)
    else:
        return
    yield from within(
        f"{shape.resampling}_sampling_block",
        first,
        norm("bn1", latent, bias=True),
        convolution("conv", latent, latent, 3, 3),
        norm("bn2", latent, bias=True),
    )


def shared_with_flux(shape: ControlNetConfig, held: HeldWeights) -> Weights:
    """The weights of FLUX's linear layers that a ControlNet with low-rank pairs uses too."""
    for weight in _blocks(shape.flux, shape.double, shape.single, held):
        if not _is_norm(weight):
            yield weight


def _with_pairs(copied: Weights, lora: ControlLora) -> Weights:
    """The same with the linear layers' weights and biases replaced by low-rank pairs."""
    for weight in copied:
        stem = weight.name.rpartition(".")[0]
        if _is_norm(weight):
            yield weight
        elif weight.product and layer_kind(stem) in lora.targets:
            yield Weight(f"{stem}.lora_A", (lora.rank, weight.shape[1]), product=True)
            yield Weight(f"{stem}.lora_B", (weight.shape[0], lora.rank), product=True)


def _is_norm(weight: Weight) -> bool:
    return weight.name.endswith(".weight") and not weight.product


def _blocks(config: Mapping[str, Any], double: int, single: int, held: HeldWeights = "bf16") -> Weights:
    """Embeddings, double and single blocks, as in FLUX and in its ControlNet."""
    width, head = hidden_width(config), config.get("attention_head_dim", 128)

    def embedder(name: str, inputs: int) -> Weights:
        yield from linear(f"time_text_embed.{name}.linear_1", width, inputs)
        yield from linear(f"time_text_embed.{name}.linear_2", width, width)

    def projections(*names: str) -> Weights:
        for name in names:
            yield from linear(name, width, width)

    def mlp(name: str) -> Weights:
        yield from linear(f"{name}.net.0.proj", MLP * width, width)
        yield from linear(f"{name}.net.2", width, MLP * width)

    def double_block() -> Weights:
        yield from linear("norm1.linear", 6 * width, width)
        yield from linear("norm1_context.linear", 6 * width, width)
        yield from norm("attn.norm_q", head)
        yield from norm("attn.norm_k", head)
        yield from projections("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        yield from norm("attn.norm_added_q", head)
        yield from norm("attn.norm_added_k", head)
        yield from projections("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
        yield from mlp("ff")
        yield from mlp("ff_context")

    def single_block() -> Weights:
        yield from linear("norm.linear", 3 * width, width)
        yield from linear("proj_mlp", MLP * width, width)
        yield from linear("proj_out", width, (1 + MLP) * width)
        yield from norm("attn.norm_q", head)
        yield from norm("attn.norm_k", head)
        yield from projections("attn.to_q", "attn.to_k", "attn.to_v")

    yield from embedder("timestep_embedder", FREQUENCIES)
    if config.get("guidance_embeds"):
        yield from embedder("guidance_embedder", FREQUENCIES)
    yield from embedder("text_embedder", config["pooled_projection_dim"])
    yield from linear("context_embedder", width, config["joint_attention_dim"])
    yield from linear("x_embedder", width, config["in_channels"])
    for name, count, block in (
        ("transformer_blocks", double, double_block),
        ("single_transformer_blocks", single, single_block),
    ):
        weights = repeated(name, count, block)
        yield from weights if held == "bf16" else in_eight_bits(weights)


def vae(folder: FluxConfig) -> Weights:
    """FLUX's VAE."""
    config = folder.vae
    latents = config["latent_channels"]
    yield from within("encoder", vae_encoder(folder))
    yield from within("decoder", _vae_decoder(folder))
    if config.get("use_quant_conv", True):
        yield from convolution("quant_conv", 2 * latents, 2 * latents, 1, 1)
    if config.get("use_post_quant_conv", True):
        yield from convolution("post_quant_conv", latents, latents, 1, 1)


def vae_encoder(folder: FluxConfig) -> Weights:
    """The VAE's encoder."""
    config, widths = folder.vae, folder.vae["block_out_channels"]
    before = widths[0]
    yield from convolution("conv_in", before, config["in_channels"], 3, 3)
    for level, width in enumerate(_levels(folder, "down_block_types", "DownEncoderBlock2D")):
        name = f"down_blocks.{level}"
        for index in range(config.get("layers_per_block", 1)):
            yield from within(f"{name}.resnets.{index}", _resnet(width, before))
            before = width
        if level < len(widths) - 1:
            yield from convolution(f"{name}.downsamplers.0.conv", width, width, 3, 3)
    yield from within("mid_block", _vae_middle(config, widths[-1]))
    yield from norm("conv_norm_out", widths[-1], bias=True)
    yield from convolution("conv_out", 2 * config["latent_channels"], widths[-1], 3, 3)


def _vae_decoder(folder: FluxConfig) -> Weights:
    config, widths = folder.vae, folder.vae["block_out_channels"]
    before = widths[-1]
    yield from convolution("conv_in", before, config["latent_channels"], 3, 3)
    for level, width in enumerate(_levels(folder, "up_block_types", "UpDecoderBlock2D")[::-1]):
        name = f"up_blocks.{level}"
        for index in range(config.get("layers_per_block", 1) + 1):
            yield from within(f"{name}.resnets.{index}", _resnet(width, before))
            before = width
        if level < len(widths) - 1:
            yield from convolution(f"{name}.upsamplers.0.conv", width, width, 3, 3)
    yield from within("mid_block", _vae_middle(config, widths[-1]))
    yield from norm("conv_norm_out", widths[0], bias=True)
    yield from convolution("conv_out", config.get("out_channels", 3), widths[0], 3, 3)


def _levels(folder: FluxConfig, key: str, kind: str) -> list[int]:
    """Channels of the VAE's levels, finest first; RunError unless all of them are blocks of one kind."""
    widths = folder.vae["block_out_channels"]
    if (stated := list(folder.vae.get(key, [kind]))) != [kind] * len(widths):
        raise RunError(f"{folder.path}/vae/config.json: {key} is {stated}, expected {len(widths)} x {kind} for FLUX")
    return list(widths)


def _resnet(width: int, inputs: int) -> Weights:
    yield from norm("norm1", inputs, bias=True)
    yield from convolution("conv1", width, inputs, 3, 3)
    yield from norm("norm2", width, bias=True)
    yield from convolution("conv2", width, width, 3, 3)
    if width != inputs:
        yield from convolution("conv_shortcut", width, inputs, 1, 1)


def _vae_middle(config: Mapping[str, Any], width: int) -> Weights:
    if config.get("mid_block_add_attention", True):
        yield from norm("attentions.0.group_norm", width, bias=True)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from linear(f"attentions.0.{name}", width, width)
    yield from repeated("resnets", 2, lambda: _resnet(width, width))


def clip(config: ClipConfig) -> Weights:
    """CLIP's text encoder."""
    width, mlp = config.hidden_size, config.intermediate_size

    def layer() -> Weights:
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"self_attn.{name}", width, width)
        yield from norm("layer_norm1", width, bias=True)
        yield from linear("mlp.fc1", mlp, width)
        yield from linear("mlp.fc2", width, mlp)
        yield from norm("layer_norm2", width, bias=True)

    yield from embedding("embeddings.token_embedding", config.vocab_size, width)
    yield from embedding("embeddings.position_embedding", config.max_position_embeddings, width)
    yield from repeated("encoder.layers", config.num_hidden_layers, layer)
    yield from norm("final_layer_norm", width, bias=True)


def t5(config: T5Config) -> Weights:
    """T5's encoder."""
    width, inner, mlp = config.d_model, config.num_heads * config.d_kv, config.d_ff
    attention, dense = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    yield from embedding("shared", config.vocab_size, width)
    for index in range(config.num_layers):
        block = f"encoder.block.{index}"
        for name in ("q", "k", "v"):
            yield from linear(f"{block}.{attention}.{name}", inner, width, bias=False)
        yield from linear(f"{block}.{attention}.o", width, inner, bias=False)
        if index == 0:  # its table of distances serves all blocks
            table = f"{block}.{attention}.relative_attention_bias"
            yield from embedding(table, config.relative_attention_num_buckets, config.num_heads)
        yield from norm(f"{block}.layer.0.layer_norm", width)
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            yield from linear(f"{block}.{dense}.{name}", mlp, width, bias=False)
        yield from linear(f"{block}.{dense}.wo", width, mlp, bias=False)
        yield from norm(f"{block}.layer.1.layer_norm", width)
    yield from norm("encoder.final_layer_norm", width)
