"""Opens the training data of a recipe: one data set, or several sources."""

from __future__ import annotations

from ...data import Dataset, open_dataset, open_sources
from ...data.spread import Broadcast
from ...recipes.schema import Data
from ..distributed.process_group import Gather, single_process


def open_training_data(
    data: Data, rank: int = 0, gather: Gather = single_process, broadcast: Broadcast | None = None
) -> Dataset:
    """The shards of `data.shards`, or of all `data.sources`; see `open_dataset`."""
    if data.sources is None:
        return open_dataset(data.shards or [], rank=rank, gather=gather, broadcast=broadcast)
    return open_sources([(source.name, source.shards) for source in data.sources], rank, gather, broadcast)
