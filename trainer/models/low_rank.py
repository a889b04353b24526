"""Linear layers of a branch or ControlNet with `weights: lora`: frozen ones of the text model or FLUX, each with a
trained low-rank pair.

The frozen layer is called as a module of the frozen model, so that ZeRO-3's hooks gather its weight, which is stored
once. It keeps nothing for the backward pass; the pair keeps its input, and the input's projection to `rank` values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...recipes.low_rank import LowRank
from .elementwise import Gated, GatedProjection
from .linear import linear
from .weights import Distribution


class AdaptedLinear(nn.Module):
    """base(x) + alpha / rank (x A^T) B^T, or base(x) without a pair.

    lora_A [rank, inputs], lora_B [outputs, rank]: as peft's; None if not `paired`. base: the frozen layer, set by
    `share`.
    """

    base: nn.Module

    def __init__(self, inputs: int, outputs: int, lora: LowRank, paired: bool) -> None:
        super().__init__()
        self.scale = lora.scale
        self.lora_A = nn.Parameter(torch.empty(lora.rank, inputs)) if paired else None
        self.lora_B = nn.Parameter(torch.empty(outputs, lora.rank)) if paired else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.lora_A is None:
            return self.base(hidden)
        return self.base(hidden) + self.expanded(linear(hidden, self.lora_A, None))

    def expanded(self, low: Tensor) -> Tensor:
        """The pair's output [..., outputs] of its input projected to [..., rank]."""
        assert self.lora_B is not None
        return linear(low * self.scale, self.lora_B, None)


class AdaptedDown(AdaptedLinear, Gated):
    """The MLP's down projection of SiLU(gate) * up; see `elementwise`."""

    def forward(self, gate: Tensor, up: Tensor, recomputed: bool) -> Tensor:  # type: ignore[override]
        """recomputed: no difference: the recomputation ends before the frozen layer, which keeps nothing."""
        product, low = GatedProjection.apply(gate, up, self.lora_A, self.product)  # type: ignore[misc]
        if self.lora_B is None:
            return self.base(product)
        update = self.expanded(low)
        return self.base(product) + update


def pair_init(name: str, shape: tuple[int, ...]) -> Distribution:
    """Initial values: of `lora_A` those of a torch Linear, of `lora_B` zero, as in peft: no update at first."""
    if name.endswith("lora_A"):
        return Distribution(shape, "uniform", shape[-1] ** -0.5)
    return Distribution(shape, "constant", 0.0)


def share(layers: Iterable[nn.Module], sources: Iterable[nn.Module]) -> None:
    """Let the adapted projections of `layers` call the frozen ones of the same names in `sources`."""
    for layer, source in zip(layers, sources, strict=True):
        for name, module in layer.named_modules():
            if isinstance(module, AdaptedLinear):
                module.__dict__["base"] = source.get_submodule(name)  # not a submodule, whose weights it would list
