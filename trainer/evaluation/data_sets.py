"""The data sets of an evaluation: image-caption pairs, or editing pairs for a stage 1 that was trained on some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...data import CaptionChoice, Dataset, open_dataset
from ...data.index import CAPTION_TYPE
from ...data.required_members import has_source_images
from ...data.shard_list import format_shards
from ...recipes.data import Data
from ..errors import RunError
from ..inference.latent_decoder import LatentDecoder
from ..inference.stored_runs import stored_recipe
from .samples import holds_pairs

PAIRS = CaptionChoice({CAPTION_TYPE: 1.0}, source_images="required")


def open_sets(
    shards: Mapping[str, str], index_dir: str | None = None, run: Path | None = None
) -> dict[str, tuple[str, Dataset]]:
    """Data set -> its shards as given, and opened: as editing pairs if they have source images. run: of stage 1; None:
    source images are ignored. RunError if the run was not trained on what a data set has, or if only one of them has
    source images."""
    found = {name: (given, open_dataset(given, index_dir=index_dir)) for name, given in shards.items()}
    if run is None:
        return found
    trained = stored_recipe(run, "patch-latents").data
    pairs = {name: _has_pairs(dataset, trained, run) for name, (_, dataset) in found.items()}
    _require_alike(pairs)
    if not any(pairs.values()):
        return found
    return {name: (given, open_dataset(given, index_dir=index_dir, captions=PAIRS)) for name, given in shards.items()}


def _has_pairs(dataset: Dataset, trained: Data, run: Path) -> bool:
    """Whether it has source images; RunError if the run can only be measured on other shards."""
    found, shards = has_source_images(dataset), format_shards(dataset.shards)
    if found and not trained.edits:
        raise RunError(
            f"{shards}: editing pairs (KEY.source.jpg or the like), and {run} was not trained on any (data.sources with"
            " task=editing): give shards without source images, or a run that was"
        )
    if not found and trained.only_edits:
        raise RunError(
            f"{shards}: no source images (KEY.source.jpg or the like), and {run} was trained on editing pairs alone:"
            " give shards of such pairs"
        )
    return found


def measures_edits(decoder: LatentDecoder, data: Dataset, heldout: Dataset | None) -> bool:
    """Whether the data sets are editing pairs. RunError if only one of them is, or stage 1 was not trained on any."""
    pairs = {"train": holds_pairs(data), **({"heldout": holds_pairs(heldout)} if heldout is not None else {})}
    _require_alike(pairs)
    decoder.require_edits(pairs["train"])
    return pairs["train"]


def _require_alike(pairs: Mapping[str, bool]) -> None:
    if len(set(pairs.values())) > 1:
        these, others = ("--data", "--heldout") if pairs["train"] else ("--heldout", "--data")
        raise RunError(f"{these} has source images and {others} has none: give two sets of pairs, or two without")
