"""The optimizers' update rules: what each keeps and moves per parameter. Without torch, for the plan."""

from __future__ import annotations

from typing import NamedTuple

from ...recipes.schema import Optimizer


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
}


def rule(settings: Optimizer) -> Rule:
    """The rule of a recipe's optimizer."""
    return RULES[settings.name]


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies to a parameter: to matrices; not to norms, biases, mask token and position table."""
    return len(shape) >= 2 and not name.endswith(("mask_token", "positions"))
