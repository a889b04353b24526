"""FLOPs of the device's operators: torch's own formulas, and those of operators that torch cannot know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ..planner.part import ATTENTION_BACKWARD

Values = Callable[[Tensor], Tensor | None]


class Flops:
    """FLOPs by operator; a FLOP is half a multiply-add.

    Attention over packed sequences is counted by their true lengths and its mask, which torch's formula does not know.
    """

    def __init__(self, values: Values) -> None:
        """values: the values of a table that was copied to the device; see `Phantom.value`."""
        self.values = values
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> float:
        return float(sum(self.counts.values()))

    def saw(self, operator: Any, arguments: tuple[Any, ...], result: Any) -> None:
        """Add an operator's FLOPs."""
        name = operator._schema.name
        if name == "torch_attn::_varlen_attn":
            query, _, _, ends, key_ends, *_, causal = arguments[:8]
            self.counts[name] += self._packed(query, ends, key_ends, causal)
        elif name == "torch_attn::_varlen_attn_backward":
            query, ends, key_ends, causal = arguments[1], arguments[6], arguments[7], arguments[10]
            self.counts[name] += int(ATTENTION_BACKWARD * self._packed(query, ends, key_ends, causal))
        elif name == "bifrost::patch_latent_loss":
            hidden, weight = arguments[:2]
            self.counts[name] += 2 * hidden.shape[0] * weight.numel()
        elif (formula := flop_registry.get(operator.overloadpacket)) is not None:
            self.counts[name] += formula(*arguments, out_val=result)

    def _packed(self, query: Tensor, ends: Tensor, key_ends: Tensor, causal: bool) -> int:
        """FLOPs of the forward pass for query [S, H, C]."""
        lengths, keys = (self._lengths(each) for each in (ends, key_ends))
        if causal:
            pairs = sum(n * (n + 1) // 2 for n in lengths)
        else:
            pairs = sum(n * m for n, m in zip(lengths, keys, strict=True))
        return 4 * pairs * query.shape[1] * query.shape[2]

    def _lengths(self, ends: Tensor) -> Sequence[int]:
        values = self.values(ends)
        assert values is not None, "the ends of packed sequences were not made on the host"
        return values.diff().tolist()
