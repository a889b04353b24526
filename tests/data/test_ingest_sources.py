"""Ingest of editing pairs: source images from folders, tables and tars; bad ones are set aside with their reason."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import small_shards
import written_tables
from bifrost.data import CaptionChoice, DataError, open_dataset, write_shard
from bifrost.data.cli import app
from bifrost.data.ingest import ingest, reasons
from bifrost.data.parquet import _Reader
from bifrost.data.tables import Columns, read_table

PAIRS = CaptionChoice({"txt": 1.0}, source_images="used")
ROWS = 70
"""Of a Parquet table, in row groups of 50: more than are read at a time."""


def target(number: int) -> bytes:
    return small_shards.pattern(number)


def source(number: int) -> bytes:
    """A JPEG."""
    file = io.BytesIO()
    Image.open(io.BytesIO(small_shards.pattern(500 + number))).save(file, "JPEG")
    return file.getvalue()


def read(out: Path | str) -> dict[str, tuple[bytes, bytes | None, str]]:
    """Key -> image, source image and caption of every sample."""
    dataset = open_dataset(str(out), captions=PAIRS)
    found = [dataset.read(*dataset.place(index)) for index in range(len(dataset))]
    return {each.key: (each.image, each.source_image, each.caption) for each in found}


def rejected(out: Path) -> dict[str, str]:
    return {each["key"]: each["reason"] for each in map(json.loads, (out / "rejected.jsonl").open())}


def write(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_folder(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        write(folder, **{f"pair{number}__png": target(number), f"pair{number}__source__jpg": source(number)})
        write(folder, **{f"pair{number}__txt": f"edit {number}".encode()})
    write(folder, plain__png=target(3), plain__txt=b"a cat")
    write(folder, cut__png=target(4), cut__source__png=target(5)[:60], cut__txt=b"cut")
    write(folder, gif__png=target(6), gif__source__gif=b"GIF89a", gif__txt=b"gif")
    write(folder, two__png=target(7), two__source__png=target(8), two__source__jpg=source(8), two__txt=b"two")
    write(folder, alone__source__png=target(9))
    write(folder, open__png=target(10), open__txt=b"open", open__source__png=target(11), open__source__txt=b"other")
    (folder / "gone.png").write_bytes(target(12))
    (folder / "gone.txt").write_text("gone")
    (folder / "gone.source.png").symlink_to(folder / "nowhere.png")
    shown = CliRunner().invoke(app, ["ingest", str(folder), str(out)])
    assert shown.exit_code == 0 and "11 read: 6 samples" in shown.output.replace("\n", " "), shown.output
    pairs = {f"pair{number}": (target(number), source(number), f"edit {number}") for number in range(3)}
    own = {"open": (target(10), None, "open"), "open%2Esource": (target(11), None, "other")}
    assert read(out) == {**pairs, "plain": (target(3), None, "a cat"), **own}
    found = rejected(out)
    assert found.keys() == {"cut", "gif", "two", "alone%2Esource", "gone"}
    assert found["cut"].startswith("source image: image does not decode")
    assert found["gif"] == "source image: not a .jpg, .jpeg, .png or .webp; convert it: gif.source.gif"
    assert found["two"] == "source image: several: two.source.jpg, two.source.png"
    assert found["alone%2Esource"] == "no caption: alone.source.txt is missing"
    assert found["gone"].startswith("source image: a link to") and "does not exist" in found["gone"]
    assert reasons(str(out))["source image: image does not decode"] == 1


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_of_files(tmp_path: Path, kind: str) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        write(folder, **{f"after/{number}.png": target(number), f"before/{number}.jpg": source(number)})
    (folder / "before/2.jpg").write_bytes(source(2)[:80])
    names = {0: "before/0.jpg", 1: "before/1.jpg", 2: "before/2.jpg", 3: "before/missing.jpg", 4: "", 5: "before/x.gif"}
    rows = [
        {"image": f"after/{min(number, 3)}.png", "text": f"edit {number}", "input": name}
        for number, name in names.items()
    ]
    written_tables.save(tmp_path / f"t.{kind}", rows)
    made = ingest(folder, out, table=tmp_path / f"t.{kind}", source_column="input")
    assert read(out) == {f"after/{number}": (target(number), source(number), f"edit {number}") for number in range(2)}
    assert (made.samples, made.rejected) == (2, 4)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").open()]
    assert {(line["key"], line["reason"].partition(" (")[0][:44]) for line in lines} == {
        ("after/2", next(line["reason"][:44] for line in lines if line["key"] == "after/2")),
        ("after/3", "source image: no such file: before/missing.j"),
        ("after/3", "source image: no file name in its column"),
        ("after/3", "source image: not a .jpg, .jpeg, .png or .we"),
    }
    assert reasons(str(out))["source image: image does not decode"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_column_of_sources_is_not_taken_for_the_images(tmp_path: Path, kind: str) -> None:
    """`image` is a default name of the column of images, and comes before `path`."""
    write(tmp_path / "in", a__png=target(0), b__jpg=source(0))
    written_tables.save(tmp_path / f"t.{kind}", [{"image": "b.jpg", "path": "a.png", "text": "edit"}])
    ingest(tmp_path / "in", tmp_path / "out", table=tmp_path / f"t.{kind}", source_column="image")
    assert read(tmp_path / "out") == {"a": (target(0), source(0), "edit")}


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: {"bytes": data, "path": None}], ids=["bytes", "struct"]
)
def test_a_table_that_holds_both_images(tmp_path: Path, wrap: Callable[[bytes], Any]) -> None:
    """As on the Hugging Face hub. Both columns are read once, in turn, through several batches and row groups."""
    rows = [
        {"edited_image": wrap(target(n)), "edit_prompt": f"edit {n}", "input_image": wrap(source(n))}
        for n in range(ROWS)
    ]
    rows[40]["input_image"] = wrap(b"GIF89a")
    rows[60]["input_image"] = None
    written_tables.save(tmp_path / "train-00000-of-00001.parquet", rows)
    columns = {"image_column": "edited_image", "caption_column": "edit_prompt", "source_column": "input_image"}
    made = ingest(tmp_path / "train-00000-of-00001.parquet", tmp_path / "out", **columns, samples_per_shard=30)
    assert (made.samples, made.rejected) == (ROWS - 2, 2)
    keys = {number: f"train-00000-of-00001/{number:08d}" for number in range(ROWS)}
    assert read(tmp_path / "out") == {
        keys[n]: (target(n), source(n), f"edit {n}") for n in range(ROWS) if n not in (40, 60)
    }
    found = rejected(tmp_path / "out")
    assert found[keys[40]].startswith("source image: ") and "GIF" in found[keys[40]]
    assert found[keys[60]] == "source image: its row holds no image bytes"


def test_both_columns_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, as an ingest does; a column that is begun again for every row would take hours."""
    rows = [{"image": target(n), "text": f"{n}", "before": source(n)} for n in range(ROWS)]
    written_tables.save(tmp_path / "t.parquet", rows)
    begun, begin = [], _Reader._begin
    monkeypatch.setattr(_Reader, "_begin", lambda self: (begun.append(self.place), begin(self)))
    for number, row in enumerate(read_table(tmp_path / "t.parquet", Columns(None, None, source="before"))):
        assert (row.image.read(), row.source.read()) == (target(number), source(number))
    assert len(begun) == 4, "two columns of two row groups"


def test_tars(tmp_path: Path) -> None:
    samples = []
    for number in range(3):
        json_text = json.dumps({"prompt": f"edit {number}"}).encode()
        images = {"input.jpg": source(number), "output.png": target(number)}
        samples.append((f"{number}", {**images, "source.png": target(90), "json": json_text}))
    del samples[2][1]["input.jpg"]
    write_shard(tmp_path / "in/a.tar", [(key, {**each, "png": target(0)}) for key, each in samples])
    columns = {"image_column": "output.png", "caption_column": "prompt", "source_column": "input.jpg"}
    ingest(tmp_path / "in", tmp_path / "out", **columns)
    assert read(tmp_path / "out") == {f"{n}": (target(n), source(n), f"edit {n}") for n in range(2)}
    assert rejected(tmp_path / "out") == {"2": "no source image: no .input.jpg"}
    members = open_dataset(str(tmp_path / "out")).entry(0, 0)[1]
    assert {"source.jpg", "other.source.png", "other.png", "png"} <= members.keys(), "nothing is lost"
    with pytest.raises(DataError, match=r"no images end in \.inputs\.jpg, members are .*--source-column"):
        ingest(tmp_path / "in", tmp_path / "new", source_column="inputs.jpg")


def test_jpgs_that_are_edited_into_pngs(tmp_path: Path) -> None:
    """The source image's extension would otherwise be the first that is taken for the image."""
    samples = [(f"{n}", {"jpg": source(n), "png": target(n), "txt": f"edit {n}".encode()}) for n in range(2)]
    write_shard(tmp_path / "in/a.tar", samples)
    ingest(tmp_path / "in", tmp_path / "out", source_column="jpg")
    assert read(tmp_path / "out") == {f"{n}": (target(n), source(n), f"edit {n}") for n in range(2)}
    samples = [("0", {"png": source(0), "after.png": target(0), "txt": b"edit"})]
    write_shard(tmp_path / "one/a.tar", samples)
    besides = (
        r"is named KEY.jpg, .jpeg, .png or .webp besides the source images, KEY.png, they are .*--image-column after"
    )
    with pytest.raises(DataError, match=besides):
        ingest(tmp_path / "one", tmp_path / "none", source_column="png")


def test_the_same_bytes_again_and_other_sources_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(5):
        write(folder, **{f"{number}__png": target(number), f"{number}__source__jpg": source(number)})
        write(folder, **{f"{number}__txt": b"edit"})
    ingest(folder, tmp_path / "out", samples_per_shard=2)
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("train-*")}
    (tmp_path / "out/train-00001.tar").unlink()
    ingest(folder, tmp_path / "out", samples_per_shard=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("train-*")} == shards
    (folder / "3.source.jpg").write_bytes(source(7))
    with pytest.raises(DataError, match="started with another content"):
        ingest(folder, tmp_path / "out", samples_per_shard=2)


def test_wrong_options_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder, a__png=target(0), a__txt=b"a", b__png=target(1), b__txt=b"b")
    (tmp_path / "t.csv").write_text("file,text\na.png,a\n")
    for options, message in (
        ({"source_column": "before"}, "--source-column before has no effect on a folder of images"),
        (
            {"table": tmp_path / "t.csv", "source_column": "before"},
            "no column before; .*: name one with --source-column",
        ),
        ({"table": tmp_path / "t.csv", "source_column": "file", "image_column": "file"}, "the images themselves"),
    ):
        with pytest.raises(DataError, match=message) as error:
            ingest(folder, tmp_path / "out", **options)
        assert "\n" not in str(error.value)
