"""Several sources as one dataset: places, replacements within a source, the loader, errors that name the source."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bifrost.data import (
    DataError,
    Loader,
    LoaderSettings,
    MixedPlan,
    PlannedSource,
    ReadableSamples,
    Segment,
    Share,
    open_sources,
)
from bifrost.data.catalogue import Headers
from bifrost.data.make_catalogue import make_catalogues


@pytest.fixture
def specs(make_shards, tmp_path: Path) -> list[tuple[str, str]]:
    """Three sources of 9, 5 and 4 samples, the first with a catalogue, the second with unreadable samples."""
    make_shards([5, 4], folder=_made(tmp_path / "a"))
    make_catalogues(f"{tmp_path}/a")
    make_shards([2, 3], broken={2, 3, 4}, folder=_made(tmp_path / "b"))
    make_shards([4], folder=_made(tmp_path / "c"))
    return [(name, f"{tmp_path}/{name}") for name in "abc"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_shards_follow_each_other_in_the_order_of_the_sources(specs) -> None:
    dataset = open_sources([specs[2], specs[0], specs[1]])
    assert [Path(shard).parent.name for shard in dataset.shards] == ["c", "a", "a", "b", "b"]
    assert dataset.samples_per_shard.tolist() == [4, 5, 4, 2, 3] and len(dataset) == 18
    assert [dataset.source(shard) for shard in range(5)] == [0, 1, 1, 2, 2]
    assert [dataset.source_shards(shard) for shard in (0, 2, 3)] == [range(1), range(1, 3), range(3, 5)]
    assert isinstance(dataset.parts[1].headers, Headers), "opened from its catalogue"
    for shard, (part, number) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]):
        alone = dataset.parts[part]
        assert dataset.headers[shard] == alone.headers[number]
        assert dataset.read(shard, 0) == alone.read(number, 0) if part < 2 else True
        assert dataset.name(shard, "k") == alone.name(number, "k")
    assert list(dataset.headers) == [dataset.headers[shard] for shard in range(len(dataset.headers))]


def test_an_unreadable_sample_is_replaced_by_one_of_its_source(specs) -> None:
    """All samples of the source's second shard are damaged: the others are in its first one, not in the next source."""
    dataset = open_sources(specs)
    samples, replaced = ReadableSamples(dataset, (8,)), []
    item = samples.read(0, 3, 1, 99, replaced)
    assert item.origin == (2, 0) and item.index == 99 and dataset.source(item.origin[0]) == 1
    assert [key for key, _ in replaced] == ["key-0003"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_source_of_every_sample(specs, workers: int) -> None:
    dataset = open_sources(specs)
    planned = [PlannedSource(number, part.samples_per_shard) for number, part in enumerate(dataset.parts)]
    plan = MixedPlan(planned, [Segment(0, {0: 2, 1: 1, 2: 1})], 8, 0, 2)
    settings = LoaderSettings((8,), workers)
    batches = list(Loader(dataset, plan, lambda items: {}, Share(0, 1, 8, 4), range(5), settings))
    assert len(batches) == 10
    seen: Counter[int] = Counter()
    for batch in batches:
        seen.update(batch.sources)
        assert len(batch.sources) == len(batch.keys) == 4
        assert len(batch.replaced) == len(batch.replaced_sources) and set(batch.replaced_sources) <= {1}
    assert seen == {0: 20, 1: 10, 2: 10}
    assert sum(len(batch.replaced) for batch in batches) == 6, "two epochs of three damaged samples"
    located = plan.locate(np.arange(40))
    assert [dataset.source(shard) for shard in located.shard.tolist()] == [
        s for batch in batches for s in batch.sources
    ]


def test_errors_name_the_source(specs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.sources, x: .*nowhere"):
        open_sources([*specs, ("x", f"{tmp_path}/nowhere")])
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    with pytest.raises(DataError, match=r"^data\.sources: c and again have the same content; name it once"):
        open_sources([*specs, ("again", f"{tmp_path}/copy")])


def test_a_changed_index_is_noticed_with_the_remedy_of_its_source(specs, tmp_path: Path) -> None:
    dataset = open_sources(specs)
    for name in ("a", "c"):
        index = tmp_path / name / "s-00000.index.jsonl"
        lines = index.read_text().splitlines(keepends=True)
        index.write_text("".join([lines[0].replace('"captions": ', '"captions": 1'), *lines[1:]]))
    with pytest.raises(DataError, match=r"a/shards\.catalogue: stale: .*bifrost data catalogue"):
        dataset.read(0, 0)
    with pytest.raises(DataError, match="changed since the dataset was opened; restart"):
        dataset.read(4, 0)


def test_a_hundred_sources_with_ten_million_samples_are_open_within_a_second(tmp_path: Path) -> None:
    """With a catalogue per source; sparse tars, and indexes with headers alone."""
    for number in range(500):
        shard = tmp_path / f"source-{number // 5:02d}" / f"train-{number:05d}.tar"
        shard.parent.mkdir(exist_ok=True)
        header = {"version": 1, "bytes": 10240, "sha256": f"{number:064x}", "samples": 20_000, "captions": 20_000}
        header |= {"caption_chars": [10, 200, 10**6], "image_bytes": 9000}
        shard.with_suffix(".index.jsonl").write_text(json.dumps(header) + "\n")
        shard.touch()
        os.truncate(shard, header["bytes"])
    folders = sorted(str(folder) for folder in tmp_path.iterdir())
    for folder in folders:
        make_catalogues(folder)
    begin = time.process_time()
    dataset = open_sources([(Path(folder).name, folder) for folder in folders])
    planned = [PlannedSource(number, part.samples_per_shard) for number, part in enumerate(dataset.parts)]
    plan = MixedPlan(planned, [Segment(0, {number: 7 + number for number in range(100)})], 4096, 0)
    plan.taken(10**9)
    assert time.process_time() - begin < 1
    assert len(dataset) == 10_000_000 and len(set(dataset.names)) == 100
