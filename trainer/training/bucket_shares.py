"""The shares of aspect-ratio buckets in the data of a recipe, for a plan."""

from __future__ import annotations

from collections.abc import Sequence

from ...data import MixedDataset
from ...data.bucket_rule import BucketRule
from ...data.bucketed_plan import BucketedPlan
from ...data.buckets import open_buckets
from ...recipes.schema import Data
from ..stages.training_data import open_training_data
from .mixture import continued, held_by_source, mixed_plan


def bucket_shares(data: Data, rule: BucketRule, global_batch: int) -> Sequence[float]:
    """The share of each bucket in a new run's global batches, from the indexes of the shards. DataError or RunError
    when they cannot be read."""
    dataset = open_training_data(data)
    buckets = open_buckets(dataset, rule)
    if isinstance(dataset, MixedDataset):
        segments = continued((), data, dataset, 0, "", held_by_source(dataset, buckets))
        order = mixed_plan(segments[:1], dataset, data, global_batch, 0, buckets)
    else:
        order = BucketedPlan(buckets, dataset.samples_per_shard, global_batch, 0)
    assert isinstance(order, BucketedPlan)
    return order.shares
