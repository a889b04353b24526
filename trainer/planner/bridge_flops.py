"""FLOPs and activations per sample of a bridge that gives FLUX additional text tokens; see `flops`."""

from __future__ import annotations

from ..models.text_bridge_config import TextBridgeConfig
from . import flux_shapes
from .flops import linear_flops, matrices, sizes
from .part import Part

# Elements saved by autograd per token and block, in units of the connector's width.
QUERIES_KEPT, CONTEXT_KEPT = 14, 3
"""Of a query, and of a token that queries attend to: latents and queries."""


def part(shape: TextBridgeConfig, byte: int) -> Part:
    """The bridge, once per sample for all draws of noise. byte: of an activation's element."""
    weights = tuple(flux_shapes.text_bridge(shape))
    patches, queries, width = shape.patches, shape.tokens, shape.width
    inputs = byte * patches * shape.latent_width  # read by the first layer
    if shape.connector is None:
        linear = linear_flops(weights, lambda name: patches)
        kept = float(inputs)
        return Part(
            "bridge",
            "trained",
            sizes(weights),
            linear,
            0.0,
            returned_linear=linear,
            first=linear,
            kept=kept,
            kept_recomputed=kept,
        )
    context = patches + queries

    def count(name: str) -> float:
        if name == "latents":
            return patches
        return context if name.endswith(("to_k", "to_v")) else queries

    linear, layers = linear_flops(weights, count), shape.connector.layers
    attention = 4.0 * queries * context * width * layers
    block = width * (QUERIES_KEPT * queries + CONTEXT_KEPT * context)
    kept = inputs + byte * (layers * block + queries * width + patches * width)
    first = linear_flops(weights, lambda name: patches if name == "latents" else 0.0)
    return Part(
        "bridge",
        "trained",
        sizes(weights),
        linear,
        attention,
        returned_linear=linear,
        returned_attention=attention,
        first=first,
        kept=kept,
        kept_recomputed=kept,
        matrices=matrices(weights),
    )
