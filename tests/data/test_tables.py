"""Tables: every row becomes a sample, or is set aside with its line and a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bifrost.data import DataError, open_dataset
from bifrost.data.ingest import ingest


@pytest.fixture
def images(tmp_path, make_image):
    """A folder with a.png to f.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abcdef"):
        (folder / f"{name}.png").write_bytes(make_image(number, "png", (8, 8)))
    return folder


def made(folder: Path, out: Path, **options) -> tuple[dict[str, str], dict[str, str]]:
    """Captions of the samples by key, and reasons of the rejected ones."""
    found = ingest(folder, out, processes=1, **options)
    dataset = open_dataset(str(out))
    captions = {}
    for shard, count in enumerate(dataset.samples_per_shard.tolist()):
        for number in range(count):
            raw = dataset.read(shard, number)
            captions[raw.key] = raw.caption
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert found.samples == len(captions) and found.rejected == len(rejected)
    return captions, {item["key"]: item["reason"] for item in rejected}


@pytest.mark.parametrize(
    ("text", "captions", "rejected"),
    [
        # A quote that is never closed, one closed by a later row's, one that is malformed.
        ('a.png,"sunset by the sea\nb.png,two\nc.png,three\n', "b c", {2: "not closed"}),
        ('a.png,"sunset by the sea\nb.png,5"\nc.png,"three, four"\n', "b c", {2: "not closed"}),
        ('a.png,"so "they" said"\nb.png,two\n', "b", {2: "malformed quotes"}),
        ('a.png,two\nb.png,"sunset', "a", {3: "malformed quotes"}),
        ('a.png,"two\nlines, with a ""quote"""\nb.png,5" pipe\n', "a b", {}),
        # Too many and too few fields; trailing empty fields are ignored.
        (
            "a.png,a dog, running\nb.png,two\nc.png\nd.png,four,,\n",
            "b d",
            {2: "3 fields, and the header names 2", 4: "1 field, and the header"},
        ),
        # Line ends, blank lines, spaces after the comma, NUL bytes, a very long caption, no file name.
        ("a.png,one\r\n\r\nb.png, two\r\n", "a b", {}),
        ("a.png,one\rb.png,two\r", "a b", {}),
        ('a.png, "one, quoted"\n,two\nc.png,th\0ree\n\0\0\0', "a", {3: "no file name", 4: "NUL", 5: "NUL"}),
        ("a.png," + "x" * 200_000 + "\nb.png,two\n", "a b", {}),
    ],
)
def test_csv_rows_become_samples_or_are_rejected_by_line(images, tmp_path, text, captions, rejected):
    (images / "metadata.csv").write_text("file_name,text\n" + text, newline="")
    found, reasons = made(images, tmp_path / "out")
    assert sorted(found) == captions.split()
    assert all("png" not in caption and '" ' not in caption.replace('5"', "") for caption in found.values())
    assert len(reasons) == len(rejected)
    for line, words in rejected.items():
        assert words in reasons[f"metadata.csv line {line}"]


def test_a_table_without_a_readable_row_has_one_cause_and_one_remedy(images, tmp_path):
    for number, (text, message) in enumerate(
        {
            "a.png,a cat, asleep\nb.png,a dog, awake\n": "no row can be read, the first: metadata.csv line 2: 3 fields,"
            " and the header names 2: quote a text that contains ','",
            "a.png\n": "metadata.csv line 2: 1 field, and the header names 2: add the missing ones",
            "no.png,a cat\n": f"no image of its rows is in {images} (no: no such file: no.png); check SRC and",
        }.items()
    ):
        (images / "metadata.csv").write_text("file_name,text\n" + text)
        with pytest.raises(DataError, match=re.escape(message)) as refused:
            ingest(images, tmp_path / f"out{number}")
        assert str(refused.value).count(";") <= 1


def test_quote_closed_by_a_later_row_is_detected_for_any_column_order(images, tmp_path):
    (images / "metadata.csv").write_text(
        'text,file_name\n"open, more,a.png\n",b.png\nthree,c.png\n"two\nlines, x",d.png\n'
    )
    found, reasons = made(images, tmp_path / "out")
    assert found == {"c": "three", "d": "two lines, x"}
    assert [key for key in reasons if "line 2" in key or "line 3" in key] == list(reasons)


def test_csv_columns_and_encodings(images, tmp_path):
    table = images / "metadata.csv"
    for number, (header, message) in enumerate(
        {
            "file_name,caption,caption": "2 columns are named caption; rename",
            "file_name,file_name,caption": "2 columns are named file_name",
            "file_name,titel": "no column is named caption or text; its columns are file_name, titel",
            "": "empty; its first line must name the columns",
        }.items()
    ):
        table.write_text(f"{header}\na.png,one,two\n" if header else "")
        with pytest.raises(DataError, match=message):
            ingest(images, tmp_path / f"bad{number}")
    for number, (text, encoding) in enumerate(
        [
            ("file_name;caption;\na.png;eins, zwei;\n", "utf-8-sig"),
            ("caption\tfile_name\neins, zwei\ta.png\n", "utf-8"),
            ('file_name,caption,,\na.png,"eins, zwei",,\n', "utf-16"),
            ("id|file_name|caption\n1|a.png|eins, zwei\n", "utf-16-be"),
        ]
    ):
        data = text.encode(encoding)
        table.write_bytes(b"\xfe\xff" + data if encoding == "utf-16-be" else data)
        assert made(images, tmp_path / f"out{number}") == ({"a": "eins, zwei"}, {})


def test_jsonl_lines_become_samples_or_are_rejected(images, tmp_path):
    lines = [
        '{"file_name": "a.png", "text": "one"}',
        "",
        '{"file_name": "b.png", "text": "two"',
        '["c.png", "three"]',
        '{"file_name": "c.png", "text": "x", "text": "y"}',
        '{"file_name": "c.png", "text": ["", "first", "second"]}',
        '{"file_name": "d.png", "text": {"text": "inner", "score": 1}}',
        '{"file_name": "e.png", "text": 7}',
        '{"file_name": {"path": "f.png"}, "text": "six"}',
        '{"text": "no name"}',
        "[" * 100_000,
    ]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    found, reasons = made(images, tmp_path / "out")
    assert found == {"a": "one", "c": "first", "d": "inner", "f": "six"}
    expected = {3: "not JSON", 4: "not a JSON object", 5: "names text twice", 10: "no file name", 11: "not JSON"}
    assert reasons.pop("e") == "the caption is not text but 7"
    assert len(reasons) == len(expected)
    for line, words in expected.items():
        assert words in reasons[f"metadata.jsonl line {line}"]


def hugging_face(path: Path, images: list, captions: list, caption_type=None, rows: int = 2) -> None:
    """A Parquet file with images in the format of Hugging Face's library."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "text": pyarrow.array(captions, caption_type)}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows)


def test_hugging_face_parquet_is_read(tmp_path, make_image):
    root = tmp_path / "set"
    stored = [make_image(i, ("png", "jpg", "webp")[i % 3], (8, 8)) for i in range(10)]
    rows = [{"bytes": data, "path": "image.jpg" if i < 7 else None} for i, data in enumerate(stored)]
    hugging_face(root / "data/train-00000-of-00002.parquet", rows[:5], [f"text {i}" for i in range(5)])
    broken = [{"bytes": b"GIF89a" + bytes(9), "path": None}, {"bytes": None, "path": "gone.png"}]
    hugging_face(root / "data/train-00001-of-00002.parquet", rows[5:] + broken, [f"text {i}" for i in range(5, 12)])
    out = tmp_path / "out"
    made = ingest(root, out, samples_per_shard=4, processes=2)
    assert made == (3, 10, 2)
    dataset = open_dataset(str(out))
    places = [(shard, n) for shard, count in enumerate(dataset.samples_per_shard.tolist()) for n in range(count)]
    read = [dataset.read(*place) for place in places]
    assert [(raw.image, raw.caption) for raw in read] == [(stored[i], f"text {i}") for i in range(10)]
    assert read[0].key == "image" and read[-1].key == "train-00001-of-00002/00000004"
    rejected = (out / "rejected.jsonl").read_text()
    assert "it is a GIF" in rejected and "no such file: gone.png" in rejected
    (root / "logo.png").write_bytes(make_image(1))
    assert ingest(root, tmp_path / "logo", processes=1).samples == 10, "an image without a caption is not data"
    (root / "logo.txt").write_text("a logo")
    with pytest.raises(DataError, match=r"holds Parquet tables and also images with captions \(logo\.png\); name the"):
        ingest(root, tmp_path / "both")
    (root / "logo.txt").unlink()
    assert ingest(root / "data/train-00000-of-00002.parquet", tmp_path / "one", processes=1).samples == 5
    assert ingest(str(root / "data/*-0000?-of*.parquet"), tmp_path / "both", processes=1).samples == 10
    hugging_face(root / "data/test-00000-of-00001.parquet", rows[:1], ["x"])
    with pytest.raises(DataError, match=r"holds the splits test, train; name one, such as '.*/data/train-\*\.parquet'"):
        ingest(root, tmp_path / "mixed")


@pytest.mark.parametrize(
    ("images_type", "captions_type", "captions"),
    [
        (pyarrow.binary(), pyarrow.large_string(), ["one", "two", "three"]),
        (pyarrow.large_binary(), pyarrow.list_(pyarrow.string()), [["one", "ein"], ["two"], [None, "three"]]),
        (None, pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["one", "two", "three"]),
        ("path", pyarrow.binary(), [b"one", b"two", b"three"]),
        ("path", pyarrow.struct([("text", pyarrow.string())]), [{"text": "one"}, {"text": "two"}, {"text": "three"}]),
    ],
)
def test_parquet_types(images, tmp_path, images_type, captions_type, captions):
    names = ["a.png", "b.png", "c.png"]
    table = images / "metadata.parquet"
    if images_type == "path":  # Hugging Face's format without embedded images
        hugging_face(table, [{"bytes": None, "path": name} for name in names], captions, captions_type)
    else:
        values = [(images / name).read_bytes() for name in names] if images_type else names
        columns = {"image": pyarrow.array(values, images_type), "text": pyarrow.array(captions, captions_type)}
        pyarrow.parquet.write_table(pyarrow.table(columns), table)
    found, reasons = made(images, tmp_path / "out")
    assert list(found.values()) == ["one", "two", "three"] and reasons == {}


def test_unusable_tables_have_a_reason(images, tmp_path):
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [[1, 2]], "text": ["x"]}), table)
    addresses, array = tmp_path / "t.csv", tmp_path / "t.jsonl"
    addresses.write_text("image,text\nhttps://example.org/a.jpg,x\n")
    array.write_text('[{"image": "a.png", "text": "x"}]')
    for path, message in {
        table: "column image holds list<.*>, not file names or images",
        addresses: r"holds URLs \(https://example.org/a.jpg\) instead of files; download the images first",
        array: "no line is a JSON object, line 1: not a JSON object; write one object per line",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            ingest(images, tmp_path / "out", table=path)
        assert "\n" not in str(caught.value)
