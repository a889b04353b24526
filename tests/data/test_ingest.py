from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from bifrost.data import DataError, open_dataset, verify, write_shard
from bifrost.data import ingest as ingest_module
from bifrost.data.ingest import ingest


def contents(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Key -> image and caption, read by WebDataset; fails on a duplicate key."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(f"file:{shard}", shardshuffle=False):
            assert sample["__key__"] not in found, "duplicate"
            image = next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample)
            found[sample["__key__"]] = image, sample["txt"].decode()
    return found


def rejects(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {item["key"]: item["reason"] for item in map(json.loads, lines)}


@pytest.fixture
def tree(tmp_path, make_image):
    """25 images with captions in nested folders; returns (folder, expected contents)."""
    root, expected = tmp_path / "tree", {}
    for number in range(25):
        kind = ("jpg", "png", "webp")[number % 3]
        folder = root / f"part{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        data = make_image(number, kind)
        (folder / f"image{number}.{kind}").write_bytes(data)
        (folder / f"image{number}.txt").write_text(f" a caption \n of {number}")
        expected[f"part{number % 2}/image{number}"] = data, f"a caption of {number}"
    return root, expected


def test_folder_is_copied_byte_for_byte(tree, tmp_path):
    root, expected = tree
    assert ingest(root, tmp_path / "out", samples_per_shard=10, processes=2) == (3, 25, 0)
    assert contents(tmp_path / "out") == expected
    dataset = open_dataset(str(tmp_path / "out/train-{00000..00002}.tar"))
    assert dataset.samples_per_shard.tolist() == [10, 10, 5]
    assert verify(dataset.shards) == []
    assert rejects(tmp_path / "out") == {}


def test_bad_items_are_set_aside_with_a_reason(tree, tmp_path, make_image):
    root, expected = tree
    (root / "cut.png").write_bytes(make_image(1)[:300])
    (root / "text.jpg").write_bytes(b"no image at all")
    (root / "empty.jpg").write_bytes(b"")
    huge = io.BytesIO()
    Image.new("1", (12000, 12000)).save(huge, "PNG")
    (root / "huge.png").write_bytes(huge.getvalue())
    (root / "blank.png").write_bytes(make_image(1))
    (root / "latin.png").write_bytes(make_image(1))
    (root / "lonely.png").write_bytes(make_image(1))
    (root / "twin.jpg").write_bytes(make_image(1, "jpg"))
    (root / "twin.png").write_bytes(make_image(1))
    (root / "a.b.png").write_bytes(make_image(1))
    for name in ("cut", "text", "empty", "huge", "twin", "a.b"):
        (root / f"{name}.txt").write_text("fine")
    (root / "blank.txt").write_text(" \n")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    made = ingest(root, tmp_path / "out", samples_per_shard=10, processes=1)
    expected["twin"] = make_image(1, "jpg"), "fine"
    expected["a%2Eb"] = make_image(1), "fine"  # a dot would end the key for WebDataset
    assert contents(tmp_path / "out") == expected
    found = rejects(tmp_path / "out")
    assert made == (4, 27, 8)
    assert set(found) == {"cut", "text", "empty", "huge", "blank", "latin", "lonely", "twin"}
    assert found["empty"] == "empty file (0 bytes)"
    assert "above the limit" in found["huge"]
    assert found["blank"] == "caption is empty"
    assert found["latin"] == "caption is not UTF-8"
    assert "lonely.txt is missing" in found["lonely"]
    assert found["twin"] == "duplicate key"


def write_table(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("image", "caption"), [("file_name", "text"), ("bild", "titel")])
def test_tables(tmp_path, make_image, kind, image, caption):
    root = tmp_path / "images"
    root.mkdir()
    rows = [{"id": i, image: f"{i}.png", caption: f"number {i}, quoted"} for i in range(6)]
    for number in range(6):
        (root / f"{number}.png").write_bytes(make_image(number))
    rows += [{"id": 6, image: "gone.png", caption: "x"}, {"id": 7, image: "0.png", caption: "again"}]
    rows += [{"id": 8, image: "1.gif", caption: "x"}]
    customary = image == "file_name"
    table = (root if customary else tmp_path) / f"metadata.{kind}"
    write_table(table, rows)
    options = {} if customary else {"table": table, "image_column": image, "caption_column": caption}
    assert ingest(root, tmp_path / "out", processes=1, **options) == (1, 6, 3)
    assert contents(tmp_path / "out") == {str(i): (make_image(i), f"number {i}, quoted") for i in range(6)}
    found = rejects(tmp_path / "out")
    assert found["gone"] == "no such file: gone.png"
    assert found["0"] == "duplicate key"
    assert "not a .jpg" in found["1"]
    if not customary:
        with pytest.raises(DataError, match="its columns are id, bild, titel: name one with --image-column"):
            ingest(root, tmp_path / "out2", table=table)
        with pytest.raises(DataError, match=r"no column tytul; its columns are .*--caption-column"):
            ingest(root, tmp_path / "out2", table=table, image_column=image, caption_column="tytul")


def test_existing_tars(tmp_path, make_image):
    source = tmp_path / "tars"
    write_shard(source / "a.tar", [(f"a{i}", {"jpg": make_image(i, "jpg"), "txt": b"by text"}) for i in range(5)])
    described = [
        ("b0", {"png": make_image(0), "json": b'{"caption": "by json", "width": 24}'}),
        ("b1", {"png": make_image(1), "json": b'{"width": 24}'}),
        ("b2", {"png": make_image(2), "json": b"{"}),
        ("b3", {"png": make_image(3)}),
        ("b4", {"txt": b"no image"}),
        ("a0", {"png": make_image(5), "txt": b"another of that key"}),
    ]
    write_shard(source / "b.tar", described)
    assert ingest(source, tmp_path / "out", samples_per_shard=4, processes=1) == (3, 7, 4)
    expected = {f"a{i}": (make_image(i, "jpg"), "by text") for i in range(5)}
    expected |= {"b0": (make_image(0), "by json"), "b/a0": (make_image(5), "another of that key")}
    assert contents(tmp_path / "out") == expected
    assert set(rejects(tmp_path / "out")) == {"b1", "b2", "b3", "b4"}
    with tarfile.open(tmp_path / "out" / "train-00001.tar") as tar:
        kept = tar.extractfile("b0.json")
        assert kept and kept.read() == described[0][1]["json"]
    os.truncate(source / "a.tar", 8000)
    made = ingest(str(source / "{a,b}.tar"), tmp_path / "out2", processes=1)
    assert 0 < made.samples < 6
    assert any("damaged after" in reason for reason in rejects(tmp_path / "out2").values())


def test_finished_ingest_is_a_noop_and_a_lost_shard_is_rebuilt(tree, tmp_path):
    root, _ = tree
    out = tmp_path / "out"
    first = ingest(root, out, samples_per_shard=10, processes=1)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("train-*")}
    assert ingest(root, out, samples_per_shard=10, processes=1) == first
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("train-*")} == before
    (out / "train-00001.tar").unlink()
    assert ingest(root, out, samples_per_shard=10, processes=1) == first
    assert {path: path.read_bytes() for path in out.glob("train-*")} == {p: data for p, (data, _) in before.items()}


def test_resume_with_another_source_or_option_is_refused(tree, tmp_path):
    root, _ = tree
    out = tmp_path / "out"
    ingest(root, out, samples_per_shard=10, processes=1)
    with pytest.raises(DataError, match="started with another samples_per_shard"):
        ingest(root, out, samples_per_shard=9)
    (root / "part0/image0.txt").write_text("changed its text")
    with pytest.raises(DataError, match="started with another content"):
        ingest(root, out, samples_per_shard=10)
    write_shard(tmp_path / "foreign/x.tar", [])
    with pytest.raises(DataError, match="not made by this ingest"):
        ingest(root, tmp_path / "foreign")


def test_input_errors_contain_the_remedy(tree, tmp_path, make_image):
    root, _ = tree
    empty = tmp_path / "empty"
    empty.mkdir()
    mute = tmp_path / "mute"
    mute.mkdir()
    (mute / "a.png").write_bytes(make_image(0))
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "a.png").write_bytes(make_image(0))
    (blank / "a.txt").write_text("")
    for src, options, message in [
        (tmp_path / "nowhere", {}, "no such folder"),
        (empty, {}, "no images"),
        (mute, {}, "1 image and no captions; put NAME.txt next to each image, or give a table with --table"),
        (blank, {}, "nothing was usable, 1 times because: caption is empty"),
        (root, {"table": root / "none.csv"}, "no such table"),
        (root, {"table": root / "part0/image0.txt"}, "not a table"),
        (root, {"samples_per_shard": 0}, "samples_per_shard is 0"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            ingest(src, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)


def test_sigkill_at_any_time_loses_or_duplicates_nothing(tmp_path, make_image):
    root = tmp_path / "many"
    root.mkdir()
    for number in range(240):
        size = (300, 200) if number % 2 else (30, 20)
        (root / f"{number:03d}.png").write_bytes(make_image(number, "png", size)[: 200 if number % 17 == 0 else None])
        (root / f"{number:03d}.txt").write_text(f"text {number}")
    whole = tmp_path / "whole"
    made = ingest(root, whole, samples_per_shard=20, processes=2)
    assert made == (12, 225, 15)

    out, random, kills, found_partial = tmp_path / "killed", np.random.default_rng(0), 0, False
    while kills < 3:
        before = len(list((out / ".ingest").glob("0*.json")))
        process = get_context("fork").Process(target=ingest, args=(root, out), kwargs={"samples_per_shard": 20})
        process.start()  # a fork of this process, which has imported what a command would spend seconds on
        while process.is_alive() and len(list((out / ".ingest").glob("0*.json"))) < min(before + 2, 12):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.05))
        workers = psutil.Process(process.pid).children() if process.is_alive() else []
        process.kill()
        process.join()
        psutil.wait_procs(workers, timeout=5)
        assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
        done = len(list((out / ".ingest").glob("0*.json")))
        found_partial |= 0 < done < 12
        kills += 1
    assert found_partial, "no kill hit the work under way"
    assert ingest(root, out, samples_per_shard=20, processes=1) == made
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in (out, whole)
    )
    assert ours == theirs
    assert len(contents(out)) == 225


@pytest.mark.parametrize("moment", range(1, 11))
def test_resume_after_a_crash_before_each_rename(tree, tmp_path, monkeypatch, moment):
    root, expected = tree
    out, rename, renames = tmp_path / "out", os.replace, []

    def crash(source, target):
        renames.append(target)
        if len(renames) == moment:
            os._exit(9)
        rename(source, target)

    begin = ingest_module._agree
    monkeypatch.setattr(ingest_module, "_agree", lambda *a: (begin(*a), monkeypatch.setattr(os, "replace", crash)))
    # Three shards, each with its index and report, make nine renames in the worker; the tenth is never reached.
    if moment < 10:
        with pytest.raises(DataError, match=r"a worker process died .* to resume"):
            ingest(root, out, samples_per_shard=10, processes=1)
    monkeypatch.undo()
    assert ingest(root, out, samples_per_shard=10, processes=1) == (3, 25, 0)
    assert contents(out) == expected
    assert verify(str(out / "train-*.tar")) == []
    assert list(out.glob("*.tmp-*")) == []


def test_concurrent_ingests_into_one_folder_are_refused(tree, tmp_path):
    from bifrost.data.processes import sole_owner

    with sole_owner(tmp_path / "out"), pytest.raises(DataError, match="another process writes here"):
        ingest(tree[0], tmp_path / "out")
