"""Folders and tars of users: every item becomes a sample or is set aside, and no option is silently ignored."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from bifrost.data import DataError, DataLost, decode_image, index_shards, open_dataset, retry, verify, write_shard
from bifrost.data.index import index_path
from bifrost.data.ingest import ingest
from bifrost.data.shard_list import expand
from bifrost.data.sources import list_source


def captions(out: Path) -> dict[str, str]:
    dataset = open_dataset(str(out))
    places = [(shard, n) for shard, count in enumerate(dataset.samples_per_shard.tolist()) for n in range(count)]
    return {raw.key: raw.caption for raw in (dataset.read(*place) for place in places)}


def reasons(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {item["key"]: item["reason"] for item in map(json.loads, lines)}


def pair(path: Path, image: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    path.with_suffix(".txt").write_text(path.stem)


def test_duplicate_keys_across_tars_are_kept(tmp_path, make_image):
    root = tmp_path / "in"
    for tar in range(3):
        samples = [(f"{i:06d}", {"png": make_image(tar * 8 + i), "txt": f"{tar} {i}".encode()}) for i in range(8)]
        samples.append((f"folder/{tar // 2:06d}", {"png": make_image(tar), "txt": b"in a folder"}))
        write_shard(root / f"{tar:05d}.tar", samples)
    assert ingest(root, tmp_path / "out", samples_per_shard=10, processes=1) == (3, 27, 0)
    found = captions(tmp_path / "out")
    assert len(found) == 27 and sorted(found.values()) == sorted(
        [f"{tar} {i}" for tar in range(3) for i in range(8)] + ["in a folder"] * 3
    )
    assert found["000003"] == "0 3" and found["00002/000003"] == "2 3"


def test_links_and_special_files(tmp_path, make_image, monkeypatch):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for number in range(4):
        pair(root / f"real/{number}.png", make_image(number))
        pair(elsewhere / f"l{number}.PNG", make_image(number))
    (elsewhere / "l0.txt").rename(elsewhere / "l0.TXT")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "real")
    (elsewhere / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    pair(root / "mute.png", make_image(1))
    (root / "mute.txt").unlink()
    (root / "mute.txt").symlink_to("nothing.txt")
    os.mkfifo(root / "fifo.jpg")
    pair(root / "pipe.png", make_image(1))
    (root / "pipe.txt").unlink()
    os.mkfifo(root / "pipe.txt")
    (root / "image.gif").write_bytes(b"GIF89a")
    (root / "folder.png").mkdir()
    monkeypatch.chdir(root)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.webp")
        made = ingest(root, tmp_path / "out", processes=1)
    assert made == (1, 8, 6)
    assert set(captions(tmp_path / "out")) == {f"real/{i}" for i in range(4)} | {f"linked/l{i}" for i in range(4)}
    assert reasons(tmp_path / "out") == {
        "gone": f"a link to {tmp_path}/nowhere.jpg, which does not exist",
        "mute": "its caption mute.txt: a link to nothing.txt, which does not exist",
        "fifo": "not a regular file",
        "pipe": "its caption pipe.txt: not a regular file",
        "socket": "not a regular file",
        "image": "not a .jpg, .jpeg, .png or .webp; convert it: image.gif",
    }


def test_hidden_names(tmp_path, make_image):
    for name in ("a.png", ".a.png", "x/..a.png"):
        pair(tmp_path / "in" / name, make_image(1))
    (tmp_path / "in/.png").write_bytes(make_image(1))
    (tmp_path / "in/.txt").write_text("no name at all")
    assert ingest(tmp_path / "in", tmp_path / "out", processes=1) == (1, 4, 0)


def test_output_folder_is_not_a_source(tmp_path, make_image):
    root = tmp_path / "in"
    for number in range(3):
        pair(root / f"{number}.png", make_image(number))
    (tmp_path / "alias").symlink_to(root)
    for out in (root, tmp_path / "alias", root / "sub/.."):
        with pytest.raises(DataError, match="the source itself; name another folder"):
            ingest(root, out)
    assert {path.name for path in root.iterdir()} == {f"{i}.{kind}" for i in range(3) for kind in ("png", "txt")}
    assert ingest(root, root / "shards", processes=1) == ingest(root, root / "shards", processes=1) == (1, 3, 0)
    assert ingest(root, root / "other", processes=1) == (1, 3, 0), "an earlier output is not a source either"
    with pytest.raises(DataError, match=r"/alias: not made by this ingest; name a new or an empty folder"):
        ingest(root, tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/rejected.jsonl").write_text("mine")
    with pytest.raises(DataError, match="not made by this ingest"):
        ingest(root, tmp_path / "used")
    assert (tmp_path / "used/rejected.jsonl").read_text() == "mine"


def test_options_without_effect_and_mixed_folders_are_refused(tmp_path, make_image):
    folder, tars, table = tmp_path / "folder", tmp_path / "tars", tmp_path / "t.csv"
    pair(folder / "a.png", make_image(1))
    write_shard(tars / "a.tar", [("a", {"png": make_image(1), "txt": b"by text"})])
    table.write_text("image,caption\na.png,by table\n")
    for src, options, message in [
        (folder, {"caption_column": "captoin"}, "--caption-column captoin has no effect on a folder"),
        (folder, {"image_column": "image"}, "--image-column image has no effect on a folder"),
        (folder, {"table": table, "caption_column": "captoin"}, "no column captoin"),
        (
            tars,
            {"caption_column": "captoin"},
            r"no member ends in \.captoin and none in \.json .* they are \.png \(1\)",
        ),
        (tars, {"image_column": "image"}, r"no member ends in \.image, they are \.png \(1\), \.txt \(1\)"),
        (str(tars / "*.tar"), {"table": table}, "no such folder, and the file names in a table are relative to one"),
    ]:
        with pytest.raises(DataError, match=message):
            ingest(src, tmp_path / "out", **options)
    write_shard(folder / "b.tar", [("b", {"png": make_image(2), "txt": b"b"})])
    with pytest.raises(DataError, match=r"holds tars and also images with captions \(a\.png\)"):
        ingest(folder, tmp_path / "out")
    (folder / "metadata.csv").write_text(table.read_text())
    with pytest.raises(DataError, match=r"holds metadata\.csv and \*\.tar; name the one to read: a table with --table"):
        ingest(folder, tmp_path / "out", caption_column="caption")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("image", "tar"),
    [("a.png", "b.tar"), ("below/a.png", "b.tar"), ("a.png", "below/b.tar"), ("one/a.png", "two/b.tar")],
)
def test_images_and_tars_in_one_folder_are_refused_at_any_depth(tmp_path, make_image, image, tar):
    root = tmp_path / "root"
    pair(root / image, make_image(1))
    write_shard(root / tar, [("b", {"png": make_image(2), "txt": b"b"})])
    with pytest.raises(DataError) as refused:
        ingest(root, tmp_path / "out")
    named = f"holds tars and also images with captions ({image}); name the tars as '{(root / tar).parent}/*.tar'"
    assert named in str(refused.value)
    (root / image).with_suffix(".txt").unlink()  # an image without a caption, such as a logo, is not data
    if (root / tar).parent == root:
        assert ingest(root, tmp_path / "out", processes=1).samples == 1


def test_error_of_folders_without_images_describes_their_content(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/images.tar.gz").touch()
    (tmp_path / "packed/labels.txt").touch()
    (tmp_path / "deep/data").mkdir(parents=True)
    (tmp_path / "deep/data/0.tar").touch()
    for folder, message in {
        "packed": r"it holds images\.tar\.gz: unpack that",
        "deep": "name the tars below it as '.*/deep/data/\\*\\.tar'",
        "packed/labels.txt": r"neither a folder, a table .* nor a plain \.tar; give a folder of images",
        "packed/images.tar.gz": r"neither a folder, a table .* nor a plain \.tar; unpack it",
    }.items():
        with pytest.raises(DataError, match=message):
            ingest(tmp_path / folder, tmp_path / "out")


def test_unnamed_table_is_suggested(tmp_path, make_image):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.png").write_bytes(make_image(1))
    (root / "labels.csv").write_text("image,caption\na.png,x\n")
    with pytest.raises(DataError, match=r"1 image and no captions; .* or give a table with --table .*/in/labels\.csv$"):
        ingest(root, tmp_path / "out")
    assert ingest(root, tmp_path / "out", table=root / "labels.csv", processes=1) == (1, 1, 0)


def test_explicit_caption_field_takes_precedence_over_a_text(tmp_path, make_image):
    root = tmp_path / "in"
    described = {"png": make_image(1), "txt": b"by text", "json": b'{"title": ["by title", "two"]}'}
    write_shard(root / "a.tar", [("a", described), ("b", {"png": make_image(2), "txt": b"by text"})])
    assert ingest(root, tmp_path / "title", caption_column="title", processes=1) == (1, 1, 1)
    assert captions(tmp_path / "title") == {"a": "by title"}
    assert reasons(tmp_path / "title") == {"b": "no caption: no .json with title"}
    with pytest.raises(DataError, match=r"1 times because: its \.json has no text under captoin|no caption"):
        ingest(root, tmp_path / "captoin", caption_column="captoin", processes=1)


def test_two_part_extensions_can_be_selected(tmp_path, make_image):
    root = tmp_path / "in"
    for number in range(2):
        write_shard(
            root / f"{number}.tar",
            [
                (
                    f"{number}{i}",
                    {
                        "input.jpg": make_image(i, "jpg"),
                        "mask.png": make_image(i),
                        "outputs.txt": b"chosen",
                        "txt": b"no",
                    },
                )
                for i in range(3)
            ],
        )
        os.unlink(index_path(str(root / f"{number}.tar")))
    with pytest.raises(DataError, match=r"they are \.input\.jpg \(6\), .*choose with --image-column input\.jpg"):
        ingest(root, tmp_path / "out")
    with pytest.raises(DataError, match=r"its image is \.input\.jpg, .*--image-column EXTENSION"):
        index_shards(str(root / "0.tar"))
    options = {"image_column": "input.jpg", "caption_column": "outputs.txt"}
    assert ingest(root, tmp_path / "out", processes=1, **options) == (1, 6, 0)
    assert set(captions(tmp_path / "out").values()) == {"chosen"}
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        names = [name for name in tar.getnames() if name.startswith("00.")]
    assert sorted(names) == ["00.jpg", "00.mask.png", "00.other.txt", "00.txt"]


def test_good_shards_are_indexed_and_bad_ones_named(tmp_path, make_image):
    for number in range(5):
        write_shard(tmp_path / f"{number}.tar", [(f"{number}", {"png": make_image(number), "txt": b"x"})])
    write_shard(tmp_path / "empty.tar", [])
    for index in tmp_path.glob("*.index.jsonl"):
        index.unlink()
    (tmp_path / "1.tar").write_bytes(b"")
    os.truncate(tmp_path / "3.tar", 700)
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(DataError) as caught:
        index_shards(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "1.tar"), str(tmp_path / "3.tar")]
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {f"{n}.index.jsonl" for n in (0, 2, 4, "empty")}
    assert len(verify(str(tmp_path))) == 2
    assert len(open_dataset([str(tmp_path / f"{n}.tar") for n in (0, 2, 4, "empty")])) == 3


def test_read_only_folder_is_named_before_reading(make_shards, tmp_path, monkeypatch):
    make_shards([1])
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("bifrost.data.write.build_index", None)
    with pytest.raises(DataError, match="not writable, and an index is stored in it; change"):
        index_shards(str(tmp_path))


def test_folder_means_its_shards(make_shards, tmp_path):
    make_shards([2, 3])
    (tmp_path / "below").mkdir()
    (tmp_path / "._s-00000.tar").write_bytes(b"as macOS leaves them")
    names = [str(tmp_path / f"s-0000{i}.tar") for i in range(2)]
    for spec in (str(tmp_path), f"{tmp_path}/", [str(tmp_path)], f"file://{tmp_path}"):
        found = expand(spec)
        assert [name.removeprefix("file://") for name in found] == names
        assert len(open_dataset(spec)) == 5
    with pytest.raises(DataError, match=r"below: a folder without \.tar files"):
        expand(str(tmp_path / "below"))
    with pytest.raises(DataError, match="named twice"):
        expand([str(tmp_path), names[0]])
    with pytest.raises(DataError, match="neither a shard nor a folder"):
        expand(str(tmp_path / "s.tar.gz"))
    for name in ("s-00001.tar", "s-00001.index.jsonl"):
        (tmp_path / name).rename(tmp_path / name.replace("s-", "heldout-"))
    with pytest.raises(
        DataError, match=r"several sets of shards \(heldout\*\.tar, s\*\.tar\); name one, such as '.*/s\*"
    ):
        open_dataset(str(tmp_path))
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, make_image, monkeypatch, caplog, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    pair(tmp_path / "in/a.png", make_image(1))
    out = tmp_path / "out"
    out.mkdir()
    host = os.uname().nodename
    for name in (f".a.tmp-{host}-{os.getpid()}", f".a.tmp-{host}-999999999", ".a.tmp-another-1"):
        (out / name).touch()
    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr("bifrost.data.processes._warned", set())
    assert ingest(tmp_path / "in", out, processes=1) == (1, 1, 0)
    assert sum("has no locks" in line for line in caplog.messages) == 1
    assert (out / f".a.tmp-{host}-{os.getpid()}").exists() and (out / ".a.tmp-another-1").exists()
    assert not (out / f".a.tmp-{host}-999999999").exists()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_bad_metadata_does_not_reject_an_image(make_image):
    png, jpg = make_image(1), make_image(1, "jpg")
    pixels = decode_image(png, 16)
    start = 8 + 25  # after the signature and IHDR
    for metadata in (
        chunk(b"tEXt", b"Comment\0" + b"x" * (2 << 20)),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(40 << 20))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
    ):
        for changed in (png[:start] + metadata + png[start:], png[:-12] + metadata + png[-12:]):
            assert (decode_image(changed, 16) == pixels).all()
    exif = b"\xff\xe1" + struct.pack(">H", 2 + 6 + 20) + b"Exif\0\0" + b"MM\0*" + b"\xff" * 16
    assert (decode_image(jpg[:2] + exif + jpg[2:], 16) == decode_image(jpg, 16)).all()


def test_jpeg_ending_in_zeros_is_rejected(make_image):
    jpg = make_image(1, "jpg", (200, 200))
    assert (decode_image(jpg + b"trailer" + bytes(99), 16) == decode_image(jpg, 16)).all()
    with_preview = jpg[:2] + b"\xff\xe2" + struct.pack(">H", 2 + 1000) + jpg[-1000:] + jpg[2:]
    for whole in (jpg, with_preview):
        decode_image(whole, 16)
        with pytest.raises(ValueError, match="does not decode: its end marker is missing"):
            decode_image(whole[: len(whole) * 2 // 3] + bytes(len(whole) // 3), 16)


def test_other_formats_are_named(make_image):
    for kind, words in {"GIF": "it is a GIF", "BMP": "it is a BMP", "TIFF": "it is a TIFF"}.items():
        file = io.BytesIO()
        Image.open(io.BytesIO(make_image(1))).save(file, kind)
        with pytest.raises(ValueError, match=f"does not decode: {words}, not a JPEG, PNG or WebP") as caught:
            decode_image(file.getvalue(), 16)
        assert "0x" not in str(caught.value)
    for data, words in {
        b"\0\0\0\x1cftypheic": "an HEIC file",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"<html>": "HTML",
        b"": "empty file",
    }.items():
        with pytest.raises(ValueError, match=words):
            decode_image(data, 16)


def test_broken_link_to_a_folder_is_set_aside(tmp_path, make_image):
    """For example a folder of images on an unmounted disk, which must not be skipped silently."""
    pair(tmp_path / "a.png", make_image(1))
    (tmp_path / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "more.2").symlink_to(tmp_path / "disk")
    source = list_source(str(tmp_path))
    assert [candidate.key for candidate in source.candidates] == ["a"]
    why = f"a link to {tmp_path / 'disk'}, which does not exist"
    assert source.rejected == [("more", why), ("more.2", why)]


@pytest.mark.parametrize("name", ["1.png", "1.txt", "in"])
def test_transient_failure_of_a_mount_loses_no_image(tmp_path, make_image, monkeypatch, name):
    """Nor are its images set aside when it stays unavailable."""
    root = tmp_path / "in"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.png").write_bytes(make_image(number))
        (root / f"{number}.txt").write_text("x")
    left, stat = [2], os.stat

    def stale(path, **options):
        if left[0] and isinstance(path, (str, Path)) and Path(path).name == name:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    monkeypatch.setattr(os, "stat", stale)
    found = list_source(str(root))
    assert len(found.candidates) == 3 and not found.rejected and left == [0]
    left[0] = 1000
    with pytest.raises(DataLost, match="Stale file handle; check the storage"):
        list_source(str(root))
