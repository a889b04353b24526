"""The optimizers' update rules: what each keeps and moves per parameter. Without torch, for the plan."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

SUB_GROUP = 1_000_000_000
"""Elements of a rank's slices that DeepSpeed updates at a time."""
BLOCK = 256
"""Elements that have a scale in common, in 8 bits."""
CHUNK = 1 << 23
"""Elements that are updated at a time in 8 bits."""


class Rule(NamedTuple):
    """state: kinds of state, each an fp32 number per element in checkpoints, by their names there. state_bytes: held
    per element. temporary: bytes per element that an update needs for a moment, of at most `at_once` elements. moved:
    bytes per element that it reads and writes."""

    state: tuple[str, ...]
    state_bytes: float
    temporary: int
    moved: int
    at_once: int = SUB_GROUP


RULES = {
    # One kernel: it reads the gradient, reads and writes master and moments.
    "adamw": Rule(("exp_avg", "exp_avg_sq"), 8, 0, 28),
    # Eight, with a copy of the moment and its sum with the gradient.
    "lion": Rule(("exp_avg",), 4, 8, 76),
    # Of a matrix: two averages, decay, and the result's addition; without what is done with whole matrices.
    "muon": Rule(("momentum_buffer",), 4, 0, 42),
    # Codes, and two scales per block; an update's sizes are counted (tests/phantom/test_eight_bit_adamw.py).
    "adamw-8bit": Rule(("exp_avg", "exp_avg_sq"), 2 + 8 / BLOCK, 49, 1823, CHUNK),
}
NEWTON_SCHULZ_STEPS = 5
"""torch's default."""


def rule_name(optimizer: str, name: str, shape: tuple[int, ...]) -> str:
    """The rule by which a recipe's optimizer updates a parameter: Muon's are the matrices within the repeated layers of
    a model, whose names contain a number. What is before and after the layers, and everything else, is AdamW's."""
    if optimizer == "muon" and not (len(shape) == 2 and re.search(r"\.\d+\.", name)):
        return "adamw"
    return optimizer


def in_eight_bits(size: int) -> bool:
    """Whether `adamw-8bit` holds a parameter of `size` elements in 8 bits, as torchao: large ones, in whole blocks."""
    return size >= 4096 and size % BLOCK == 0


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
