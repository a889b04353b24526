"""One part of a recipe's model in a plan. A FLOP is half a multiply-add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Gradient = Literal["none", "through", "trained"]

ATTENTION_BACKWARD = 2.5
"""Ratio of attention's backward FLOPs to its forward FLOPs: five products instead of two."""


@dataclass(frozen=True)
class Part:
    """One part of the model: its parameters and its cost per sample.

    parameters: elements of every parameter, in order; widths: bytes of an element of each, None for those of the run's
    precision, empty if all are. linear, attention: FLOPs of the forward pass. returned_linear,
    returned_attention: the portion that gradients flow back through. first: FLOPs of trained layers whose inputs need
    no gradient. kept: bytes saved by autograd; kept_recomputed: the same with every layer recomputed; kept_once: the
    same of what all samples of a micro-batch share, in bytes per micro-batch. layer: bytes of the layer being
    recomputed; gradients: bytes of activation gradients in flight, gradients_recomputed: the same next to a recomputed
    layer; in_use: the most bytes that a frozen encoder has in use in its pass, which comes before all others and keeps
    nothing. last: FLOPs at the end of the layers whose results are not saved: recomputation stops before them. place:
    as in recipes' `Placement`. shared: whether its parameters are another part's, used once more. matrices: shapes of
    the parameters that Muon would update, of a trained part.
    """

    name: str
    gradient: Gradient
    parameters: tuple[int, ...]
    linear: float
    attention: float
    place: str = "sharded"
    returned_linear: float = 0.0
    returned_attention: float = 0.0
    first: float = 0.0
    kept: float = 0.0
    kept_recomputed: float = 0.0
    kept_once: float = 0.0
    layer: float = 0.0
    gradients: float = 0.0
    gradients_recomputed: float = 0.0
    in_use: float = 0.0
    last: float = 0.0
    widths: tuple[int | None, ...] = ()
    shared: bool = False
    matrices: tuple[tuple[int, int], ...] = ()

    def stored(self, plain: int) -> list[tuple[int, int]]:
        """Elements and bytes per element of every parameter, in order. plain: bytes in the run's precision."""
        widths = self.widths or (None,) * len(self.parameters)
        return [(size, width or plain) for size, width in zip(self.parameters, widths, strict=True)]

    @property
    def size(self) -> int:
        """Elements of its own parameters."""
        return 0 if self.shared else sum(self.parameters)

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """2 FLOPs per weight and token for the gradient of each input that needs one, and of each trained weight."""
        products = {"none": 0, "through": 1, "trained": 2}[self.gradient]
        return products * self.returned_linear - self.first + self.backward_attention

    @property
    def backward_attention(self) -> float:
        return ATTENTION_BACKWARD * self.returned_attention

    @property
    def recomputed(self) -> float:
        """FLOPs of the second forward pass of recomputed layers; only with activation checkpointing."""
        return self.forward - self.last if self.layer else 0.0


FLOPS = ("linear", "attention", "returned_linear", "returned_attention", "first", "last")
BYTES = ("kept", "kept_recomputed", "kept_once", "layer", "gradients", "gradients_recomputed", "in_use")


def combined(parts: Sequence[Part], shares: Sequence[float]) -> Part:
    """One part on samples of several shapes: the mean of its FLOPs, and the most bytes. shares: of the samples, which
    add up to 1."""
    mean = {name: sum(s * getattr(part, name) for s, part in zip(shares, parts, strict=True)) for name in FLOPS}
    return replace(parts[0], **mean, **{name: max(getattr(part, name) for part in parts) for name in BYTES})
