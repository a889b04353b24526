"""The sources of a run with their weights, over all of its attempts.

A segment is a part of the sequence of global batches with the same sources and weights. Checkpoints and `mixture.json`
in the run folder contain all segments, so that the sequence before a change stays known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data import MixedDataset, MixedPlan, PlannedSource, SampleOrder, Segment
from ...data.bucketed_plan import BucketedPlan, Mixture
from ...data.buckets import Buckets
from ...data.mixture import whole_weights
from ...recipes.data import Data, Source, Task
from ...recipes.secrets import redact
from ..errors import RunError
from ..io import read_json

FILE = "mixture.json"


@dataclass(frozen=True)
class SourceRecord:
    """One source in a segment."""

    name: str | None
    """None: of `data.shards`, before the run had sources."""
    number: int
    """In the order of first use in the run; the order and the draws of its samples depend on it."""
    weight: int
    """A whole number; 0 is none of it in this segment."""
    samples: int | None
    """With `data.buckets`, those that are in a bucket."""
    fingerprint: str
    """See `Dataset.fingerprint`; it identifies the source."""
    shards: str | list[str]
    """As the recipe named them."""
    captions: dict[str, float] | None = None
    caption_dropout: float | None = None
    """Like `Source`."""
    buckets: list[int] | None = None
    """With `data.buckets`: its samples in each."""
    task: Task = "generation"
    """Like `Source`."""

    def described(self, total: int) -> dict[str, Any]:
        """Name, samples and share of the weights' `total`, and task and use of captions where the recipe sets them."""
        task = None if self.task == "generation" else self.task
        captions = {"task": task, "captions": self.captions, "caption_dropout": self.caption_dropout}
        return {
            "name": self.name,
            "samples": self.samples,
            "share": self.weight / total,
            **{key: value for key, value in captions.items() if value is not None},
        }


@dataclass(frozen=True)
class MixtureSegment:
    batch: int
    """The first global batch, counted from 0."""
    sources: tuple[SourceRecord, ...]

    @property
    def read(self) -> tuple[SourceRecord, ...]:
        """The sources of which there are samples."""
        return tuple(source for source in self.sources if source.weight)

    @property
    def weights(self) -> dict[int, int]:
        return {source.number: source.weight for source in self.read}

    @property
    def uses(self) -> dict[int, tuple[Any, ...]]:
        """What the segment fixes of every source that is read."""
        return {
            source.number: (source.weight, source.task, source.captions, source.caption_dropout) for source in self.read
        }

    def described(self) -> list[dict[str, Any]]:
        """`SourceRecord.described` of every source that is read, for an event."""
        total = sum(self.weights.values())
        return [source.described(total) for source in self.read]

    def __str__(self) -> str:
        return ", ".join(map(_text, self.described()))


def _text(source: dict[str, Any]) -> str:
    """`photos 25 % (captions {"txt": 1}, caption_dropout 0.2)`"""
    more = [f"{key} {json.dumps(source[key])}" for key in ("task", "captions", "caption_dropout") if key in source]
    return f"{source['name']} {100 * source['share']:.4g} %" + (f" ({', '.join(more)})" if more else "")


Segments = tuple[MixtureSegment, ...]


def to_json(segments: Segments) -> list[dict[str, Any]]:
    """The segments for a JSON file, without the signatures of addresses."""
    return json.loads(redact(json.dumps([asdict(segment) for segment in segments])))


def from_json(stored: Sequence[dict[str, Any]]) -> Segments:
    return tuple(
        MixtureSegment(each["batch"], tuple(SourceRecord(**source) for source in each["sources"])) for each in stored
    )


def stored_segments(state: dict[str, Any] | None) -> Segments:
    """The segments up to a checkpoint with JSON `state`; of a run on `data.shards`, that data set alone."""
    if state is None:
        return ()
    if "mixture" in state:
        return from_json(state["mixture"])
    shards = state["recipe"]["data"]["shards"]
    return (MixtureSegment(0, (SourceRecord(None, 0, 1, None, state["data"], shards),)),)


def held_by_source(dataset: MixedDataset, buckets: Buckets | None) -> list[list[int]] | None:
    """The samples of each source in every bucket; None without buckets."""
    if buckets is None:
        return None
    ends = np.cumsum([len(part.shards) for part in dataset.parts])
    return [counts.sum(axis=1).tolist() for counts in np.split(buckets.counts, ends[:-1], axis=1)]


def continued(
    earlier: Segments,
    data: Data,
    dataset: MixedDataset,
    batch: int,
    place: str,
    held: Sequence[list[int]] | None = None,
) -> Segments:
    """The segments of a run that continues at global batch `batch` with `data.sources`: those before, one from there on
    if sources, weights, tasks or the use of captions differ, and those that are scheduled. RunError when a source's
    name had another content, or none of its images is in a bucket. place: names the run for it. held: see
    `held_by_source`."""
    known = [source for segment in earlier for source in segment.sources]
    numbers = {source.fingerprint: source.number for source in known}
    contents = {source.name: source.fingerprint for source in known}
    found = []
    for source, part, own in zip(data.trained, dataset.parts, held or [None] * len(dataset.parts), strict=True):
        if own is not None and not any(own):
            raise RunError(f"data.sources, {source.name}: no image is large enough for a bucket; leave it out")
        if contents.get(source.name, part.fingerprint) != part.fingerprint:
            raise RunError(
                f"{place}: the shards of the source {source.name} were others in this run; restore them, or name the"
                " new ones as a source of their own"
            )
        number = numbers.setdefault(part.fingerprint, len(numbers))
        captions = source.captions or data.captions, source.caption_dropout
        samples = len(part) if own is None else sum(own)
        use = *captions, own, source.task
        found.append(SourceRecord(source.name, number, 0, samples, part.fingerprint, source.shards, *use))
    places = {source.fingerprint: source.shards for source in found}
    # What began or was to begin at this batch or later was never trained on.
    segments = [_moved(each, places) for each in earlier if each.batch < batch]
    for start in (batch, *(change for change in data.changes if change > batch)):
        segment = _weighted(start, found, data)
        if segments and segments[-1].sources[0].name is not None and segments[-1].uses == segment.uses:
            segments[-1] = replace(segment, batch=segments[-1].batch)
        else:
            segments.append(segment)
    return tuple(segments)


def _weighted(start: int, sources: Sequence[SourceRecord], data: Data) -> MixtureSegment:
    """The segment of `sources` with their weights from global batch `start` on."""
    weights = whole_weights(data.weights([source.samples or 0 for source in sources], start))
    weighted = (replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True))
    return MixtureSegment(start, tuple(weighted))


def _moved(segment: MixtureSegment, places: dict[str, str | list[str]]) -> MixtureSegment:
    """The segment with the shards of its sources where they are now. places: fingerprint of a source -> its shards."""
    return replace(
        segment,
        sources=tuple(
            replace(source, shards=places.get(source.fingerprint, source.shards)) for source in segment.sources
        ),
    )


def new_segments(segments: Segments, state: dict[str, Any] | None) -> Segments:
    """Those of `segments` that the checkpoint with JSON `state` does not have: from its step on, or scheduled."""
    before = [(each.batch, each.uses) for each in stored_segments(state)]
    return tuple(each for each in segments if (each.batch, each.uses) not in before)


def mixed_plan(
    segments: Segments,
    dataset: MixedDataset,
    data: Data,
    global_batch: int,
    seed: int,
    buckets: Buckets | None = None,
) -> SampleOrder:
    """The order of the samples of `dataset`, which has all sources of the last of `segments` that are read. RunError
    when the buckets of an earlier source are not known."""
    numbers = {source.fingerprint: source.number for segment in segments for source in segment.sources}
    sources = [PlannedSource(numbers[part.fingerprint], part.samples_per_shard) for part in dataset.parts]
    parts = [Segment(segment.batch, segment.weights) for segment in segments]
    if buckets is None:
        return MixedPlan(sources, parts, global_batch, seed, data.shuffle_window)
    held = {each.number: each.buckets for segment in segments for each in segment.sources if each.buckets is not None}
    if unknown := [each for segment in segments for each in segment.read if each.number not in held]:
        raise RunError(
            f"data.sources: this run began on data.shards={unknown[0].shards}, which is not among them; name it as one"
            " of the sources"
        )
    mixture = Mixture(sources, parts, held)
    return BucketedPlan(buckets, dataset.samples_per_shard, global_batch, seed, data.shuffle_window, mixture)


def read_segments(run: Path) -> Segments:
    """All segments of the run in a folder, which has `data.sources`. RunError when the file is missing."""
    stored = read_json(run / FILE)
    if stored is None:
        raise RunError(f"{run / FILE}: missing or damaged, so the sources of a step are unknown; restore it")
    return from_json(stored["segments"])


def until(segments: Segments, batch: int) -> Segments:
    """The segments up to the one with global batch `batch`, counted from 0."""
    return tuple(segment for segment in segments if segment.batch <= batch)


def data_of(segment: MixtureSegment, data: Data) -> Data:
    """The settings with which a segment was read. Those of a run before it had sources have `data.shards`."""
    first = segment.sources[0]
    if first.name is None:
        return data.model_copy(update={"shards": first.shards, "sources": None})
    sources = [
        Source(
            name=str(source.name),
            shards=source.shards,
            task=source.task,
            weight=float(source.weight),
            captions=source.captions,
            caption_dropout=source.caption_dropout,
        )
        for source in segment.read
    ]
    return data.model_copy(update={"sources": sources})


def require_content(segments: Segments, dataset: MixedDataset, run: Path) -> None:
    """RunError when a source of `dataset` has another content than in the last of `segments`, those of a run."""
    for source, part in zip(segments[-1].read, dataset.parts, strict=True):
        if part.fingerprint != source.fingerprint:
            raise RunError(f"data.sources, {source.name}: are not the shards that {run} was trained on; restore them")
