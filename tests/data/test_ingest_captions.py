"""Several captions per image: of several columns or fields, and of lists, each in a member of its own."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import written_tables
from bifrost.data import CaptionChoice, DataError, open_dataset, write_shard
from bifrost.data.ingest import ingest

ROWS = [
    {"file": "0.png", "long": "long 0", "Short text": "short 0"},
    {"file": "1.png", "long": "long 1", "Short text": None},
    {"file": "2.png", "long": None, "Short text": "short 2"},
    {"file": "3.png", "long": " ", "Short text": ""},
]
COLUMNS = ["long", "Short text"]


def members(out: Path) -> dict[str, bytes]:
    """Name -> content of all texts, as tarfile reads them."""
    with tarfile.open(out / "train-00000.tar") as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file and name.endswith(".txt")}


@pytest.fixture
def images(tmp_path: Path, make_image) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(make_image(number))
    return folder


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_tables(images: Path, tmp_path: Path, kind: str) -> None:
    """A sample that lacks one caption has the other; one without any is set aside. Trained on without a choice, KEY.txt
    is the first column."""
    table = written_tables.save(tmp_path / f"t.{kind}", ROWS)
    out = tmp_path / "out"
    assert ingest(images, out, table=table, caption_column=COLUMNS, processes=1) == (1, 3, 1)
    assert members(out) == {
        "0.txt": b"long 0",
        "0.short_text.txt": b"short 0",
        "1.txt": b"long 1",
        "2.short_text.txt": b"short 2",
    }
    assert json.loads((out / "rejected.jsonl").read_text())["reason"] == "caption is empty"
    assert open_dataset(str(out)).read(0, 0).caption == "long 0"
    dataset = open_dataset(str(out), captions=CaptionChoice({"short_text.txt": 1, "txt": 1}, lambda *at: 0.1))
    assert [dataset.read(0, sample).caption for sample in range(3)] == ["short 0", "long 1", "short 2"]
    with pytest.raises(DataError, match="started with another caption_column"):
        ingest(images, out, table=table, caption_column=COLUMNS[:1], processes=1)
    with pytest.raises(DataError, match=r"no column brief; its columns are file, long, Short text: .*--caption-column"):
        ingest(images, tmp_path / "x", table=table, caption_column=["long", "brief"], processes=1)


def test_lists_and_fields_of_json(tmp_path: Path, make_image) -> None:
    described = {"captions": ["one", " ", "two", {"text": "three"}], "short": ["s one", "s two"]}
    samples = [
        ("a", {"png": make_image(0), "txt": b"left out", "json": json.dumps(described).encode()}),
        ("b", {"png": make_image(1), "json": b'{"short": "only this"}'}),
        ("c", {"png": make_image(2), "json": b"{"}),
        ("d", {"png": make_image(3), "extra.txt": b"kept", "json": b'{"captions": "d"}'}),
    ]
    write_shard(tmp_path / "in/a.tar", samples)
    out = tmp_path / "out"
    assert ingest(tmp_path / "in", out, caption_column=["captions", "short"], processes=1) == (1, 3, 1)
    assert members(out) == {
        "a.txt": b"one",
        "a.2.txt": b"two",
        "a.3.txt": b"three",
        "a.short.txt": b"s one",
        "a.short.2.txt": b"s two",
        "b.short.txt": b"only this",
        "d.txt": b"d",
        "d.extra.txt": b"kept",
    }
    assert json.loads((out / "rejected.jsonl").read_text()) == {"key": "c", "reason": "its .json does not parse"}
    with pytest.raises(DataError, match=r"--caption-column extra\.txt: a member, which is kept as it is"):
        ingest(tmp_path / "in", tmp_path / "x", caption_column=["captions", "extra.txt"], processes=1)


def test_columns_whose_members_would_have_one_name(images: Path, tmp_path: Path) -> None:
    for others, named in ((["a b", "A_b"], "KEY.a_b.txt"), (["2"], "KEY.2.txt")):
        with pytest.raises(DataError, match=f"captions would be in {named}, as others; rename the column"):
            ingest(images, tmp_path / "out", caption_column=["first", *others])


def test_an_output_of_an_earlier_version_with_first_captions_only(images: Path, tmp_path: Path) -> None:
    """It is neither extended nor changed."""
    table = tmp_path / "t.jsonl"
    table.write_text('{"file": "0.png", "caption": ["x", "y"]}\n')
    out = tmp_path / "out"
    ingest(images, out, table=table, processes=1)
    assert members(out) == {"0.txt": b"x", "0.2.txt": b"y"}
    report = out / ".ingest/00000.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "unused_captions": 1}))
    with pytest.raises(
        DataError, match="made by an earlier version, with only the first caption of each list; name a new"
    ):
        ingest(images, out, table=table, processes=1)
