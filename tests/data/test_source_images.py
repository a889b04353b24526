"""Source images of editing pairs: read with their sample, never dropped in silence."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import editing_pairs
import small_shards
from bifrost.data import CaptionChoice, DataError, open_dataset, verify, write_shard
from bifrost.data.cli import app
from bifrost.data.errors import BadSample
from bifrost.data.index import build_index, save_index
from bifrost.data.samples import ReadableSamples
from bifrost.data.source_images import SourceImages
from bifrost.data.transforms import decode_image

FULL = editing_pairs.pair(1)


def choice(use: SourceImages) -> CaptionChoice:
    return CaptionChoice({"txt": 1.0}, source_images=use)


def test_every_sample_has_its_own(tmp_path: Path) -> None:
    dataset = open_dataset(str(editing_pairs.save(tmp_path)), captions=choice("required"))
    samples = ReadableSamples(dataset, (32,))
    replaced: list[tuple[str, str]] = []
    for number in range(len(dataset)):
        item = samples.read(0, *dataset.place(number), number, replaced)
        for found, pattern in ((item.image, 100 + number), (item.source_image, editing_pairs.SOURCE + number)):
            np.testing.assert_array_equal(found, decode_image(small_shards.pattern(pattern), 32))
    assert not replaced


@pytest.mark.parametrize("use", ["ignored", "used"])
def test_a_sample_without_one(tmp_path: Path, use: SourceImages) -> None:
    write_shard(tmp_path / "a.tar", [("with", FULL), ("without", {"png": FULL["png"], "txt": b"a cat"})])
    dataset = open_dataset(str(tmp_path), captions=choice(use))
    found = [dataset.read(0, sample).source_image for sample in range(2)]
    assert found == [FULL["source.png"] if use == "used" else None, None]


def test_missing_and_damaged_ones_are_replaced_with_their_reason(tmp_path: Path) -> None:
    bad = {
        "missing": {kind: data for kind, data in FULL.items() if kind != "source.png"},
        "cut": {**FULL, "source.png": FULL["source.png"][:60]},
        "empty": {**FULL, "source.png": b""},
    }
    write_shard(tmp_path / "a.tar", [*bad.items(), ("good", FULL)])
    dataset = open_dataset(str(tmp_path), captions=choice("required"))
    samples, replaced = ReadableSamples(dataset, (32,)), []
    for sample in range(4):
        item = samples.read(0, 0, sample, sample, replaced)
        assert item.key == "good" and item.source_image is not None
    assert [key for key, _ in replaced] == ["missing", "cut", "empty"]
    missing, cut, empty = (reason for _, reason in replaced)
    assert missing == "no source image"
    assert cut.startswith("source image: image does not decode")
    assert empty == "source image: empty file (0 bytes)"
    with pytest.raises(BadSample, match="no source image"):
        dataset.read(0, 0)


def test_shards_without_any_are_refused(shards: Path) -> None:
    with pytest.raises(
        DataError, match=r"no source images in 4 shards; task=editing needs KEY\.source\.jpg"
    ) as refused:
        open_dataset(str(shards), captions=choice("required"))
    assert "\n" not in str(refused.value)
    assert len(open_dataset(str(shards), captions=choice("used")))


def test_one_far_from_its_image_is_read_apart(tmp_path: Path) -> None:
    """All source images behind all others, as `tar cf x.tar *.png *.source.png` stores them."""
    filler = np.random.default_rng(0).bytes(2 << 20)
    members = [("a.png", FULL["png"]), ("a.txt", FULL["txt"]), ("b.bin", filler), ("a.source.png", FULL["source.png"])]
    with tarfile.open(shard := tmp_path / "a.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    save_index(str(shard), build_index(str(shard)))
    dataset = open_dataset(str(shard), captions=choice("required"))
    assert len(dataset.spans(0, 0)) == 3, "what is requested ahead of a remote shard"
    found = dataset.read(0, 0)
    assert (found.image, found.source_image) == (FULL["png"], FULL["source.png"])


def test_they_are_counted_verified_and_ingested(tmp_path: Path) -> None:
    """Of tars. A damaged one is set aside with its sample."""
    bad = {**FULL, "source.png": FULL["source.png"][:60]}
    write_shard(tmp_path / "in/a.tar", [("good", FULL), ("bad", bad), ("plain", {"png": FULL["png"], "txt": b"a cat"})])
    run = CliRunner()
    counted = run.invoke(app, ["stats", str(tmp_path / "in")]).output
    assert any("source images" in line and line.split()[-2] == "2" for line in counted.splitlines()), counted
    assert run.invoke(app, ["ingest", str(tmp_path / "in"), str(tmp_path / "out")]).exit_code == 0
    dataset = open_dataset(str(tmp_path / "out"), captions=choice("used"))
    assert [dataset.entry(0, sample)[0] for sample in range(len(dataset))] == ["good", "plain"]
    assert dataset.read(0, 0).source_image == FULL["source.png"]
    assert "source image: image does not decode" in (tmp_path / "out/rejected.jsonl").read_text()

    shard = tmp_path / "in/a.tar"
    flipped = bytearray(shard.read_bytes())
    flipped[build_index(str(shard)).entry(0)[1]["source.png"][0] + 20] ^= 1
    shard.write_bytes(flipped)
    (problem,) = verify(str(shard))
    assert "altered (content hash)" in problem
