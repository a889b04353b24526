"""Opens the training data of a recipe: one data set, or several sources, with the choice of their captions."""

from __future__ import annotations

from functools import partial

import numpy as np

from ...data import CaptionChoice, DataError, Dataset, open_dataset, open_sources
from ...data.caption_choice import KEY_TXT
from ...data.source_images import SourceImages
from ...data.spread import Broadcast
from ...recipes.data import Captions, Source
from ...recipes.schema import Data
from ..distributed.process_group import Gather, single_process
from ..models.rng import Stream, uniform


def open_training_data(
    data: Data, seed: int = 0, rank: int = 0, gather: Gather = single_process, broadcast: Broadcast | None = None
) -> Dataset:
    """The shards of `data.shards`, or of all `data.sources`; see `open_dataset`. seed: of the choice of captions."""
    if data.sources is None:
        choice = caption_choice(data.captions, seed)
        return open_dataset(
            data.shards or [],
            rank=rank,
            gather=gather,
            broadcast=broadcast,
            captions=choice,
            index_dir=data.index_dir,
        )
    choices = [
        caption_choice(source.captions or data.captions, seed, "required" if source.task == "editing" else "ignored")
        for source in data.trained
    ]
    named = [(source.name, source.shards) for source in data.trained]
    return open_sources(named, rank, gather, broadcast, choices, data.index_dir)


def open_texts(
    source: Source, data: Data, seed: int, rank: int, gather: Gather, broadcast: Broadcast | None = None
) -> Dataset:
    """The shards of an understanding source, of whose samples images are read with questions alone; see
    `open_dataset`."""
    choice = caption_choice(source.captions or data.captions, seed, images="used" if source.asks else "ignored")
    more = {"rank": rank, "gather": gather, "broadcast": broadcast, "index_dir": data.index_dir}
    try:
        dataset = open_dataset(source.shards, captions=choice, **more)
        if source.asks and len({header.texts for header in dataset.headers if header.samples}) > 1:
            raise DataError("some shards have images and others do not; make two sources of them")
    except DataError as error:
        raise type(error)(f"data.sources, {source.name}: {error}") from error
    return dataset


def caption_choice(
    captions: Captions | None, seed: int, source_images: SourceImages = "ignored", images: SourceImages = "required"
) -> CaptionChoice:
    """What chooses among the members `captions`, None: KEY.txt, and the use of source images and images."""
    return CaptionChoice(captions or KEY_TXT.weights, partial(_draw, seed), source_images, images)


def _draw(seed: int, epoch: int, index: int) -> float:
    return float(uniform(seed, Stream.CAPTION, np.array([epoch]), np.array([index]), 1)[0, 0])
