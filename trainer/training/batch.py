"""How the global batch divides over ranks."""

from __future__ import annotations

from ...recipes import Recipe
from ..errors import RunError


def batch_arithmetic(recipe: Recipe, ranks: int) -> int:
    """Backward passes a step; RunError when the batch does not divide over the ranks, or they over nodes."""
    if (node := recipe.zero.hpz) and ranks > node and ranks % node:
        raise RunError(f"zero.hpz {node}: {ranks} ranks are no whole number of nodes of {node}; set zero.hpz=null")
    try:
        return recipe.accumulation(ranks)
    except ValueError as error:
        raise RunError(str(error)) from None
