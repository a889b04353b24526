"""A ControlNet with `controlnet.weights: lora`: its linear layers that FLUX has too are FLUX's, with low-rank pairs."""

from __future__ import annotations

from torch import Tensor, nn

from ...recipes.stage2 import ControlLora
from .controlnet_config import is_shared, layer_kind
from .flux_blocks import GeluLinear
from .flux_functions import gelu_linear
from .low_rank import AdaptedLinear


class AdaptedGelu(AdaptedLinear):
    """`GeluLinear` with a pair, whose input is computed again in the backward pass, as for the frozen layer."""

    def forward(self, mlp: Tensor, attended: Tensor | None = None, recomputed: bool = False) -> Tensor:  # type: ignore[override]
        if self.lora_A is None:
            return self.base(mlp, attended, recomputed)
        update = self.expanded(gelu_linear(mlp, attended, self.lora_A, None))
        return self.base(mlp, attended, recomputed) + update  # last: where nothing is kept, it is not recomputed


def adapt(network: nn.Module, lora: ControlLora) -> None:
    """Replace the linear layers of a ControlNet that FLUX has too; `share` connects them with FLUX's."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and is_shared(name):
            kind = AdaptedGelu if isinstance(module, GeluLinear) else AdaptedLinear
            paired = layer_kind(name) in lora.targets
            network.set_submodule(name, kind(module.in_features, module.out_features, lora, paired))
