"""Division of the global batch over ranks."""

from __future__ import annotations

from ...recipes import Recipe
from ..errors import RunError


def batch_arithmetic(recipe: Recipe, ranks: int) -> int:
    """Backward passes per step; RunError when the batch does not divide over the ranks, or the ranks over nodes."""
    if (node := recipe.zero.hpz) and ranks > node and ranks % node:
        raise RunError(f"zero.hpz={node} needs a multiple of {node} ranks, got {ranks}; set zero.hpz=null")
    try:
        return recipe.accumulation(ranks)
    except ValueError as error:
        raise RunError(str(error)) from None
