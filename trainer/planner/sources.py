"""How many samples of each source a run takes, where the recipe alone decides it, and how many of them are editing
pairs."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from ...recipes.data import Data


def samples_of_sources(data: Data, global_batch: int, samples: int) -> dict[str, int]:
    """Name -> samples of it among the first `samples` of the run, up to one per change of the weights. Empty without
    `data.sources`, and if shares depend on the sizes of the sources, which a plan does not read."""
    if not data.sources or any(source.weight is None for source in data.trained):
        return {}
    starts = [start * global_batch for start in data.changes]
    taken = [Fraction(0)] * len(data.trained)
    for change, (start, end) in zip(data.changes, pairwise([*starts, max(samples, starts[-1])]), strict=True):
        weights = data.weights([0] * len(data.trained), change)
        for place, weight in enumerate(weights):
            taken[place] += max(0, min(end, samples) - start) * weight / sum(weights)
    return {source.name: round(count) for source, count in zip(data.trained, taken, strict=True)}


def edited_share(data: Data, global_batch: int, steps: int) -> float:
    """The share of editing pairs among the samples of a run; the most that it can be, 1, if it depends on the sizes of
    the sources."""
    if not data.edits:
        return 0.0
    taken = samples_of_sources(data, global_batch, global_batch * steps)
    edited = sum(taken.get(source.name, 0) for source in data.sources or () if source.task == "editing")
    return edited / sum(taken.values()) if taken else 1.0
