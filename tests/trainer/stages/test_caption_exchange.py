"""Captions exchanged between samples: whose, how often, and independent of the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bifrost.data import Dataset, Item, RawSample, ReadableSamples, open_dataset, write_shard
from bifrost.trainer.stages.caption_exchange import CaptionExchange


def items(dataset: Dataset) -> list[Item]:
    found = ReadableSamples(dataset, (4,))
    return [found.read(0, *dataset.place(number), number, []) for number in range(len(dataset))]


def test_every_sample_gets_the_next_caption_of_its_shard(shards: Path) -> None:
    dataset = open_dataset(f"{shards}/train-*.tar")
    before = items(dataset)
    after = CaptionExchange(dataset, seed=0, share=1.0)(before, [False] * len(before))
    for number, (was, now) in enumerate(zip(before, after, strict=True)):
        following = number + 1 if (number + 1) % 15 else number - 14  # shards of 15
        assert (now.caption, now.key, now.origin) == (
            before[following].caption,
            before[following].key,
            before[following].origin,
        )
        assert now.image is was.image and (now.epoch, now.index) == (was.epoch, was.index)
        assert now.caption != was.caption


def test_a_fraction_is_exchanged_whatever_the_batch(shards: Path) -> None:
    dataset = open_dataset(f"{shards}/train-*.tar")
    exchange = CaptionExchange(dataset, seed=3, share=0.25)
    drawn = [
        Item(epoch, one.index, one.key, one.image, one.caption, (), one.origin)
        for epoch in range(40)
        for one in items(dataset)
    ]
    together = exchange(drawn, [False] * len(drawn))
    share = np.mean([now.key != was.key for was, now in zip(drawn, together, strict=True)])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(drawn)) ** 0.5
    assert [each.caption for one in drawn[:120] for each in exchange([one], [False])] == [
        each.caption for each in together[:120]
    ]


def test_samples_without_caption_are_passed_over(tmp_path: Path, shards: Path) -> None:
    image = open_dataset(f"{shards}/train-00000.tar").read(0, 0).image
    captions = {"a": b"one", "b": None, "c": b"three", "d": None}
    write_shard(
        tmp_path / "x-0.tar",
        [(key, {"png": image} | ({} if text is None else {"txt": text})) for key, text in captions.items()],
    )
    write_shard(tmp_path / "x-1.tar", [("alone", {"png": image, "txt": b"alone"})])
    dataset = open_dataset(f"{tmp_path}/x-*.tar")
    pixels = np.zeros((4, 4, 3), np.uint8)
    first, third, alone = (
        Item(0, number, key, pixels, text, (), origin)
        for number, key, text, origin in [
            (0, "a", "one", (0, 0)),
            (2, "c", "three", (0, 2)),
            (4, "alone", "alone", (1, 0)),
        ]
    )
    after = CaptionExchange(dataset, seed=0, share=1.0)([first, third, alone], [False] * 3)
    assert [each.caption for each in after] == ["three", "one", "alone"]


def test_a_dropped_caption_costs_no_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(f"{shards}/train-*.tar")
    before = items(dataset)[:3]
    reads: list[int] = []
    read = dataset.read

    def counted(shard: int, sample: int, epoch: int, index: int) -> RawSample:
        reads.append(sample)
        return read(shard, sample, epoch, index)

    monkeypatch.setattr(dataset, "read", counted)
    after = CaptionExchange(dataset, seed=0, share=1.0)(before, [True, False, True])
    assert [now.key == was.key for was, now in zip(before, after, strict=True)] == [True, False, True]
    assert reads == [2]
