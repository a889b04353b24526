"""Names and shapes of a model's parameters, from its settings alone.

In the order of the built modules' `named_parameters`, by which DeepSpeed gathers them; tests hold both to each other.
This file describes the backbone and the generation branch, `flux_shapes` FLUX and its ControlNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from ...recipes.branch import Branch, Lora
from ...recipes.fields import HeldWeights

FREQUENCIES = 128
"""Sines and as many cosines of a flow head's noise level, as in `FlowHead`, whose module imports torch."""


class Weight(NamedTuple):
    """A parameter. product: whether a linear layer or convolution multiplies by it; width: bytes per element, None for
    those of the run's precision."""

    name: str
    shape: tuple[int, ...]
    product: bool = False
    width: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Weights = Iterator[Weight]


def within(prefix: str, *groups: Iterable[Weight]) -> Weights:
    """The weights of a module's parts, named within `prefix`."""
    for group in groups:
        for weight in group:
            yield weight._replace(name=f"{prefix}.{weight.name}")


def repeated(prefix: str, count: int, part: Callable[[], Iterable[Weight]]) -> Weights:
    """The weights of a list of `count` equal parts."""
    for index in range(count):
        yield from within(f"{prefix}.{index}", part())


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Weights:
    yield from _product(name, (outputs, inputs), outputs if bias else 0)


def convolution(name: str, outputs: int, inputs: int, *kernel: int, bias: bool = True) -> Weights:
    yield from _product(name, (outputs, inputs, *kernel), outputs if bias else 0)


def transposed_convolution(name: str, inputs: int, outputs: int, *kernel: int) -> Weights:
    yield from _product(name, (inputs, outputs, *kernel), outputs)


def norm(name: str, width: int, bias: bool = False) -> Weights:
    yield Weight(f"{name}.weight", (width,))
    if bias:
        yield Weight(f"{name}.bias", (width,))


def embedding(name: str, rows: int, width: int) -> Weights:
    yield Weight(f"{name}.weight", (rows, width))


def _product(name: str, shape: tuple[int, ...], bias: int) -> Weights:
    yield Weight(f"{name}.weight", shape, product=True)
    if bias:
        yield Weight(f"{name}.bias", (bias,))


def in_eight_bits(weights: Iterable[Weight]) -> Weights:
    """The same with the weights of linear layers in 8 bits, each after its scales in 32."""
    for weight in weights:
        if weight.product:
            yield Weight(f"{weight.name.removesuffix('.weight')}.scale", weight.shape[:1], width=4)
            weight = weight._replace(width=1)
        yield weight


def vision_encoder(config: Any) -> Weights:
    """Qwen2.5-VL's vision encoder. config: its `vision_config`."""
    width, mlp = config.hidden_size, config.intermediate_size
    merged = width * config.spatial_merge_size**2
    kernel = config.temporal_patch_size, config.patch_size, config.patch_size

    def block() -> Weights:
        yield from norm("norm1", width)
        yield from norm("norm2", width)
        yield from linear("attn.qkv", 3 * width, width)
        yield from linear("attn.proj", width, width)
        yield from linear("mlp.gate_proj", mlp, width)
        yield from linear("mlp.up_proj", mlp, width)
        yield from linear("mlp.down_proj", width, mlp)

    yield from convolution("patch_embed.proj", width, config.in_channels, *kernel, bias=False)
    yield from repeated("blocks", config.depth, block)
    yield from norm("merger.ln_q", width)
    yield from linear("merger.mlp.0", merged, merged)
    yield from linear("merger.mlp.2", config.out_hidden_size, merged)


def text_model(config: Any, held: HeldWeights = "bf16") -> Weights:
    """Qwen2.5-VL's text model without its output layer. config: its `text_config`; held: how its linear layers hold
    their weights."""
    yield from embedding("embed_tokens", config.vocab_size, config.hidden_size)
    yield from _decoder(config) if held == "bf16" else in_eight_bits(_decoder(config))


def branch(config: Any, side: int, settings: Branch) -> Weights:
    """The generation branch on `side` x `side` patches. config: the `text_config`."""
    width = config.hidden_size
    yield Weight("mask_token", (1, 1, width))
    if settings.positions == "learned":
        yield Weight("positions", (1, side * side, width))
    lora = settings.lora if settings.weights == "lora" else None
    yield from _decoder(config, settings.layers, lora)


def shared_layers(config: Any, held: HeldWeights, layers: Collection[int]) -> Weights:
    """The weights of the text model that a branch with low-rank pairs shares: of the linear layers of its `layers`."""
    for weight in text_model(config, held):
        at = weight.name.split(".")
        if at[0] == "layers" and int(at[1]) in layers and at[2] in ("self_attn", "mlp"):
            yield weight


def head(width: int, settings: Branch) -> Weights:
    """The head for patch latents of `width` channels."""
    if settings.head == "linear":
        yield Weight("weight", (width, width), product=True)
        yield Weight("bias", (width,))
        return
    inner = settings.flow_head.width or width

    def block() -> Weights:
        yield from linear("modulation", 3 * inner, inner)
        yield from linear("up", inner, inner)
        yield from linear("down", inner, inner)

    yield from linear("noisy", inner, width)
    yield from linear("condition", inner, width)
    yield from linear("level", inner, 2 * FREQUENCIES)
    yield from repeated("blocks", settings.flow_head.layers, block)
    yield from linear("modulation", 2 * inner, inner)
    yield from linear("clean", width, inner)


def _decoder(config: Any, layers: int | None = None, lora: Lora | None = None) -> Weights:
    """The text model's layers, or `layers` like them, and final norm. lora: with low-rank pairs instead of weights."""
    width, mlp = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (width // config.num_attention_heads)

    def projection(name: str, outputs: int, inputs: int, bias: bool) -> Weights:
        if lora is None:
            yield from linear(name, outputs, inputs, bias)
        elif name.rpartition(".")[2] in lora.targets:
            yield Weight(f"{name}.lora_A", (lora.rank, inputs), product=True)
            yield Weight(f"{name}.lora_B", (outputs, lora.rank), product=True)

    def layer() -> Weights:
        yield from projection("self_attn.q_proj", width, width, True)
        yield from projection("self_attn.k_proj", keys, width, True)
        yield from projection("self_attn.v_proj", keys, width, True)
        yield from projection("self_attn.o_proj", width, width, False)
        yield from projection("mlp.gate_proj", mlp, width, False)
        yield from projection("mlp.up_proj", mlp, width, False)
        yield from projection("mlp.down_proj", width, mlp, False)
        yield from norm("input_layernorm", width)
        yield from norm("post_attention_layernorm", width)

    yield from repeated("layers", config.num_hidden_layers if layers is None else layers, layer)
    yield from norm("norm", width)
