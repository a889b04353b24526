"""One of several captions per sample: which one, in any order of reading, and what is read of the shard."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

import faulty_server
from bifrost.data import (
    CaptionChoice,
    DataError,
    Item,
    Loader,
    LoaderSettings,
    Plan,
    ReadableSamples,
    Share,
    open_dataset,
    open_sources,
    write_shard,
)

WEIGHTS = {"txt": 3.0, "short.txt": 1.0, "a.long.txt": 4.0}
SHARDS, SAMPLES = 3, 12
EMPTY, WITHOUT, BROKEN = 4, 5, 7
"""Samples whose short caption is blank, without any caption, and with a truncated image."""


def draw(epoch: int, index: int) -> float:
    return (((epoch * 7919 + index * 104729) % 1009) + 0.5) / 1009


def members(number: int) -> list[str]:
    """Captions of a sample: some samples lack some of them."""
    if number == WITHOUT:
        return []
    return ["txt", "short.txt", "a.long.txt"] if number % 3 else ["txt", "a.long.txt"][: 1 + number % 2]


def expected(number: int, epoch: int) -> str:
    """The member of a sample, by intervals of the draw in which members follow each other by name."""
    at = draw(epoch, number)
    if number % 3:
        return "a.long.txt" if at < 0.5 else "short.txt" if at < 0.625 else "txt"
    return "txt" if not number % 2 or at >= 4 / 7 else "a.long.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    for shard in range(SHARDS):
        samples = []
        for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            image = make_image(number)
            texts = {kind: f"{kind} of {number}".encode() for kind in members(number)}
            if number == EMPTY:
                texts["short.txt"] = b" \n"
            samples.append((f"k{number:03d}", {"png": image[:90] if number == BROKEN else image, **texts}))
        write_shard(folder / f"s-{shard:05d}.tar", samples)
    return folder


def opened(spec: str, weights: dict[str, float] = WEIGHTS):
    return open_dataset(spec, captions=CaptionChoice(weights, draw))


def as_they_are(items: list[Item]) -> dict[str, list[Item]]:
    return {"items": items}


def read(spec: str, rank: int = 0, ranks: int = 1, steps: range = range(9), workers: int = 0) -> list[tuple]:
    """Number of the step and of the pass, key, caption, member and name of every sample of a rank; three epochs."""
    dataset = opened(spec)
    plan = Plan(dataset.samples_per_shard, seed=1, shuffle_window=2)
    settings = LoaderSettings((8,), workers)
    loader = Loader(dataset, plan, as_they_are, Share(rank, ranks, 12, 3), steps, settings)
    passes = 4 // ranks
    found = []
    for number, batch in enumerate(loader):
        step, row = divmod(number, passes)
        for item, name in zip(batch.arrays["items"], batch.names, strict=True):
            found.append((steps[step], row * ranks + rank, item.key, item.caption, item.caption_member, name))
    loader.close()
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple]:
    return read(f"{folder}/s-*.tar")


def test_the_member_of_a_sample_follows_from_its_draw(folder: Path, whole: list[tuple]) -> None:
    """Every readable sample in three epochs has the caption that its draw selects, which changes between epochs."""
    dataset = opened(f"{folder}/s-*.tar")
    located = Plan(dataset.samples_per_shard, seed=1, shuffle_window=2).locate(range(108))
    assert len(whole) == 108
    seen = set()
    for (*_, key, caption, member, _), epoch, index in zip(whole, located.epoch, located.index, strict=True):
        number = int(key[1:])
        if number != index:
            continue  # a replacement
        assert (caption, member) == (f"{expected(number, epoch)} of {number}", expected(number, epoch))
        seen.add((number, member))
    readable = set(range(36)) - {WITHOUT, BROKEN}
    assert {number for number, _ in seen} == readable
    assert len(seen) > len(readable), "epochs choose differently"
    assert {member for _, member in seen} == set(WEIGHTS)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0), (4, 3)])
def test_any_number_of_ranks_and_workers(folder: Path, whole: list[tuple], ranks: int, workers: int) -> None:
    parts = [sample for rank in range(ranks) for sample in read(f"{folder}/s-*.tar", rank, ranks, workers=workers)]
    parts.sort(key=lambda sample: sample[:2])
    assert parts == whole


def test_a_resume_at_any_step_on_other_ranks(folder: Path, whole: list[tuple]) -> None:
    for start in (1, 4, 8):
        rest = [sample for rank in (0, 1) for sample in read(f"{folder}/s-*.tar", rank, 2, range(start, 9))]
        assert sorted(rest, key=lambda sample: sample[:2]) == [each for each in whole if each[0] >= start]


@pytest.mark.parametrize("workers", [0, 2])
def test_read_ahead_and_retries(folder: Path, whole: list[tuple], monkeypatch, workers: int) -> None:
    """From a server, also one that fails at random: what is requested ahead is what is read, one range per sample."""
    monkeypatch.setattr("bifrost.data.retry._sleep", lambda seconds: None)
    monkeypatch.setattr("bifrost.data.read_ahead.LONGEST_RANGE", 1)
    with faulty_server.serving(folder) as (address, plan):
        spec = f"{address}/s-{{00000..00002}}.tar"
        assert read(spec, workers=workers) == whole
        asked = [path for _, path, ranged in plan.asked if path.endswith(".tar") and ranged and ranged != "bytes=0-0"]
        replaced = 2 * 3 + sum(expected(EMPTY, epoch) == "short.txt" for epoch in range(3))
        assert len(asked) <= 108 + 2 * replaced
        plan.chance, plan.faults = 0.2, ("503", "reset", "cut")
        assert read(spec, workers=workers) == whole
        assert plan.fired, "no fault occurred"


def test_a_replacement_and_what_was_read_before(folder: Path) -> None:
    """A blank caption makes a sample unusable in the epochs that choose it, and in no other, whatever was read before.
    The draw of the planned sample chooses among the captions of its replacement."""
    dataset = opened(f"{folder}/s-*.tar")
    wanted = [(epoch, number) for epoch in range(12) for number in (EMPTY, WITHOUT, BROKEN, 0, 1)]
    blank = [epoch for epoch in range(12) if expected(EMPTY, epoch) == "short.txt"]
    assert 0 < len(blank) < 12

    def readings(order: list[tuple[int, int]]) -> dict[tuple[int, int], tuple]:
        samples = ReadableSamples(dataset, (8,))
        items = {at: samples.read(at[0], *dataset.place(at[1]), at[1], []) for at in order}
        return {at: (item.key, item.caption, item.caption_member, item.index) for at, item in items.items()}

    found = readings(wanted)
    for seed in range(5):
        order = random.Random(seed).sample(wanted, len(wanted))
        assert readings(order) == found
    for epoch in range(12):
        key, caption, member, index = found[epoch, EMPTY]
        assert index == EMPTY
        if epoch not in blank:
            assert (key, member) == (f"k{EMPTY:03d}", expected(EMPTY, epoch))
        else:  # the next one has no caption at all, and the one after it has txt alone
            assert (key, caption) == ("k006", "txt of 6")
        key, _, member, _ = found[epoch, BROKEN]
        at = draw(epoch, BROKEN)
        assert (key, member) == ("k008", "a.long.txt" if at < 0.5 else "short.txt" if at < 0.625 else "txt")


def test_only_the_chosen_member_is_read_with_the_image(folder: Path) -> None:
    """One range, from the header of the image to the end of the caption, by tarfile's own offsets."""
    dataset = opened(f"{folder}/s-*.tar")
    with tarfile.open(folder / "s-00000.tar") as tar:
        places = {member.name: (member.offset, member.offset_data + member.size) for member in tar}
    for epoch in range(6):
        member = expected(1, epoch)
        (span,) = dataset.spans(0, 1, epoch, 1)
        edges = [*places["k001.png"], *places[f"k001.{member}"]]
        assert span == (min(edges), max(edges) - min(edges))
        assert dataset.read(0, 1, epoch, 1).caption == f"{member} of 1"


def test_the_order_of_weights_does_not_matter() -> None:
    choice, other = CaptionChoice(WEIGHTS, draw), CaptionChoice(dict(reversed(WEIGHTS.items())), draw)
    picked = [choice.among(WEIGHTS, 0, index) for index in range(500)]
    assert picked == [other.among(WEIGHTS, 0, index) for index in range(500)]
    assert len(set(picked)) == 3
    assert CaptionChoice(WEIGHTS, lambda epoch, index: 1 - 2**-54).among(WEIGHTS, 0, 0) == "txt"
    assert CaptionChoice(WEIGHTS, draw).among(["png", "json"], 0, 0) is None


def test_names_are_those_of_the_member(folder: Path) -> None:
    """The name of a sample with KEY.txt is as it was before captions were chosen, so that digests stay."""
    plain, chosen = open_dataset(f"{folder}/s-*.tar"), opened(f"{folder}/s-*.tar")
    sha256 = plain.headers[0].sha256
    assert plain.name(0, "k001") == chosen.name(0, "k001", "txt") == f"{sha256} k001"
    assert chosen.name(0, "k001", "short.txt") == f"{sha256} k001.short.txt"


def test_a_member_that_no_sample_has_is_refused(folder: Path, tmp_path: Path, make_image) -> None:
    with pytest.raises(
        DataError, match=r"no captions in KEY\.brief: 36 samples of 3 shards have \.a\.long\.txt, \.png"
    ):
        opened(f"{folder}/s-*.tar", {"txt": 1, "brief": 1})
    write_shard(tmp_path / "long.tar", [("a", {"png": make_image(0), "long.txt": b"only this"})])
    with pytest.raises(DataError, match="no captions"):
        open_dataset(f"{tmp_path}/long.tar")
    assert opened(f"{tmp_path}/long.tar", {"long.txt": 1}).read(0, 0).caption == "only this"
    choices = [CaptionChoice(weights, draw) for weights in (WEIGHTS, {"long.txt": 1, "short.txt": 1})]
    with pytest.raises(DataError, match=r"^data\.sources, b: .* no captions in KEY\.short\.txt"):
        open_sources([("a", f"{folder}/s-*.tar"), ("b", f"{tmp_path}/long.tar")], captions=choices)


def test_each_source_has_its_own_captions(folder: Path, tmp_path: Path, make_image) -> None:
    write_shard(tmp_path / "b.tar", [("b", {"png": make_image(0), "txt": b"plain", "short.txt": b"short"})])
    choices = [CaptionChoice({"a.long.txt": 1.0}), CaptionChoice({"short.txt": 1.0})]
    dataset = open_sources([("a", f"{folder}/s-*.tar"), ("b", f"{tmp_path}/b.tar")], captions=choices)
    assert dataset.read(0, 1).caption == "a.long.txt of 1"
    assert dataset.read(3, 0).caption == "short"


def test_any_usable_caption(folder: Path) -> None:
    """For what needs the image alone: a sample counts as readable if one of its captions is."""
    dataset = opened(f"{folder}/s-*.tar", {"short.txt": 1, "txt": 1})
    assert dataset.read_any(0, EMPTY).caption == f"txt of {EMPTY}"
    assert dataset.read_any(0, 0).caption == "txt of 0"
    with pytest.raises(ValueError, match="no caption"):
        dataset.read_any(0, WITHOUT)
