"""Shards, indexes, the sample plan, reading and batching, ingest and the demo dataset.

Names are imported lazily: `Loader` needs torch, `bifrost.data.plan` does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import BadSample, DataError, DataLost, DataMissing

if TYPE_CHECKING:
    from .caption_choice import CaptionChoice
    from .mixed_dataset import MixedDataset, open_sources
    from .mixture import MixedPlan, PlannedSource, Segment
    from .plan import Located, Plan, SampleOrder, Share, rank_positions
    from .reader import Batch, Loader, LoaderSettings, stacked, worker_failure
    from .samples import BadSamples, Item, ReadableSamples
    from .shards import Dataset, RawSample, open_dataset
    from .transforms import clean_caption, decode_image
    from .write import index_shards, verify, write_shard

_MODULES = {
    "caption_choice": ("CaptionChoice",),
    "mixed_dataset": ("MixedDataset", "open_sources"),
    "mixture": ("MixedPlan", "PlannedSource", "Segment"),
    "plan": ("Located", "Plan", "SampleOrder", "Share", "rank_positions"),
    "reader": ("Batch", "Loader", "LoaderSettings", "stacked", "worker_failure"),
    "samples": ("BadSamples", "Item", "ReadableSamples"),
    "shards": ("Dataset", "RawSample", "open_dataset"),
    "transforms": ("clean_caption", "decode_image"),
    "write": ("index_shards", "verify", "write_shard"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BadSample",
    "BadSamples",
    "Batch",
    "CaptionChoice",
    "DataError",
    "DataLost",
    "DataMissing",
    "Dataset",
    "Item",
    "Loader",
    "LoaderSettings",
    "Located",
    "MixedDataset",
    "MixedPlan",
    "Plan",
    "PlannedSource",
    "RawSample",
    "ReadableSamples",
    "SampleOrder",
    "Segment",
    "Share",
    "clean_caption",
    "decode_image",
    "index_shards",
    "open_dataset",
    "open_sources",
    "rank_positions",
    "stacked",
    "verify",
    "worker_failure",
    "write_shard",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
