"""The optimizers' update rules: what each keeps and moves per parameter. Without torch, for the plan."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Rule(NamedTuple):
    """state: kinds of state, each an fp32 number per element, named as in checkpoints. temporary: bytes per element of
    the slice being updated. moved: bytes per element that an update reads and writes."""

    state: tuple[str, ...]
    temporary: int
    moved: int

    @property
    def state_bytes(self) -> int:
        """Per element."""
        return 4 * len(self.state)


RULES = {
    # One kernel: it reads the gradient, reads and writes master and moments.
    "adamw": Rule(("exp_avg", "exp_avg_sq"), 0, 28),
    # Eight, with a copy of the moment and its sum with the gradient.
    "lion": Rule(("exp_avg",), 8, 76),
    # Of a matrix: two averages, decay, and the result's addition; without what is done with whole matrices.
    "muon": Rule(("momentum_buffer",), 0, 42),
}
NEWTON_SCHULZ_STEPS = 5
"""torch's default."""


def rule_name(optimizer: str, name: str, shape: tuple[int, ...]) -> str:
    """The rule by which a recipe's optimizer updates a parameter: Muon's are the matrices within the repeated layers of
    a model, whose names contain a number. What is before and after the layers, and everything else, is AdamW's."""
    if optimizer == "muon" and not (len(shape) == 2 and re.search(r"\.\d+\.", name)):
        return "adamw"
    return optimizer


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter: to matrices; not to norms, biases, mask token and position table."""
    return len(shape) >= 2 and not name.endswith(("mask_token", "positions"))


def rounds(shapes: Sequence[tuple[int, int]], ranks: int) -> list[list[int]]:
    """Numbers of the matrices that ranks orthogonalize at the same time, one each, in turn; those that take about as
    long are together."""
    ordered = sorted(range(len(shapes)), key=lambda index: -orthogonalization_flops(shapes[index]))
    return [ordered[start : start + ranks] for start in range(0, len(ordered), ranks)]


def orthogonalization_flops(shape: tuple[int, int]) -> float:
    """FLOPs of Newton-Schulz on a matrix: per step X X^T, its square, and its product with X."""
    small, large = sorted(shape)
    return NEWTON_SCHULZ_STEPS * (4.0 * small * small * large + 2.0 * small**3)


def orthogonalization_bytes(shape: tuple[int, int]) -> float:
    """Bytes at the peak of Newton-Schulz on a matrix: five bf16 copies, as exchanged and as torch makes them, and two
    of X X^T's size."""
    small, large = sorted(shape)
    return 2.0 * (5 * small * large + 2 * small * small)


def adjusted(lr: float, shape: tuple[int, int]) -> float:
    """The learning rate for an orthogonalized matrix with which its elements move as far as under AdamW, by the root of
    their mean square: torch's `match_rms_adamw`."""
    return lr * (0.2 * math.sqrt(max(shape)))
