from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile

import fsspec
import pytest
import webdataset

from bifrost.data import DataError, index_shards, open_dataset, verify, write_shard
from bifrost.data.atomic import write_atomic
from bifrost.data.index import build_index, index_path, load_index


@pytest.fixture
def shard(tmp_path, make_image):
    path = tmp_path / "train-00000.tar"
    samples = [(f"dir/k{i}", {"png": make_image(i), "txt": f"text {i}".encode(), "json": b"{}"}) for i in range(7)]
    write_shard(path, samples)
    return path, samples


def test_webdataset_reads_the_shard(shard):
    path, samples = shard
    read = list(webdataset.WebDataset(f"file:{path}", shardshuffle=False))
    assert [(s["__key__"], {k: s[k] for k in ("png", "txt", "json")}) for s in read] == samples


def test_index_has_offsets_sizes_and_hash(shard):
    path, samples = shard
    index = load_index(str(path))
    data = path.read_bytes()
    assert index.header.bytes == len(data)
    assert index.header.sha256 == hashlib.sha256(data).hexdigest()
    assert (index.header.samples, index.header.captions, index.header.caption_chars) == (7, 7, (6, 6, 42))
    for number, (key, members) in enumerate(samples):
        found, places = index.entry(number)
        assert found == key
        assert {kind: data[at : at + size] for kind, (at, size) in places.items()} == members


def test_equal_samples_give_equal_bytes(shard, tmp_path):
    path, samples = shard
    write_shard(tmp_path / "again.tar", samples)
    assert (tmp_path / "again.tar").read_bytes() == path.read_bytes()


def test_failed_write_leaves_no_files(tmp_path, make_image):
    def samples():
        yield "a", {"png": make_image(0), "txt": b"x"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", samples())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "kind"), [("a.b", "png"), ("d/.a", "png"), ("", "png"), ("a", "PNG")])
def test_key_that_would_be_read_as_another_is_refused(tmp_path, make_image, key, kind):
    with pytest.raises(DataError, match="a key ends at the first dot of its base name"):
        write_shard(tmp_path / "x.tar", [("d.e/f", {"png": make_image(0)}), (key, {kind: make_image(0)})])
    assert list(tmp_path.iterdir()) == []


def external_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_external_tar_is_indexed_unchanged(tmp_path, make_image, form):
    path = tmp_path / "foreign.tar"
    long = "d" * 90 + "/" + "k" * 60  # needs a prefix, a GNU long name or a pax header
    members = [
        (f"{long}.JPG", make_image(1, "jpg")),
        (f"{long}.seg.png", b"mask"),
        (f"{long}.txt", "ein Bär".encode()),
        ("only-text.txt", b"no image"),
        ("uncaptioned.webp", make_image(2, "webp")),
    ]
    external_tar(path, members, format=form)
    before = path.read_bytes()
    [(_, header)] = index_shards(str(path))
    assert path.read_bytes() == before
    assert (header.samples, header.captions, header.caption_chars) == (2, 1, (7, 7, 7))
    raw = open_dataset(str(path)).read(0, 0)
    assert (raw.key, raw.image, raw.caption) == (long, members[0][1], "ein Bär")
    assert verify(str(path)) == []


def test_read_only_folder_is_named(shard, monkeypatch):
    def refused(path, data):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("bifrost.data.files.write_atomic", refused)
    with pytest.raises(DataError, match=r"\.index\.jsonl: Permission denied; check the permissions"):
        index_shards(str(shard[0]))


def test_only_missing_skips_indexed_shards(shard, tmp_path):
    path, samples = shard
    write_shard(tmp_path / "train-00001.tar", samples)
    os.unlink(index_path(str(path)))
    done = index_shards(str(tmp_path / "train-*.tar"), only_missing=True)
    assert [name for name, _ in done] == [str(path)]


def test_verify_reports_problems(tmp_path, make_image):
    names = ["good", "truncated", "altered", "unindexed", "cut-unindexed", "index", "renamed-away"]
    for name in names:
        write_shard(tmp_path / f"{name}.tar", [(f"{name}{i}", {"png": make_image(i), "txt": b"x"}) for i in range(5)])
    shards = {name: tmp_path / f"{name}.tar" for name in names}
    os.truncate(shards["truncated"], 6000)
    data = bytearray(shards["altered"].read_bytes())
    data[1000] ^= 1
    shards["altered"].write_bytes(data)
    os.truncate(shards["cut-unindexed"], 6000)
    for name in ("unindexed", "cut-unindexed"):
        os.unlink(index_path(str(shards[name])))
    index = tmp_path / "index.index.jsonl"
    index.write_bytes(index.read_bytes().replace(b"index3", b"index9"))
    shards["renamed-away"].unlink()

    problems = verify([str(path) for path in shards.values()])
    expected = {
        "truncated": "truncated",
        "altered": "altered (content hash)",
        "unindexed": "unindexed",
        "cut-unindexed": "truncated",
        "index": "altered index",
        "renamed-away": "no such shard",
    }
    assert len(problems) == len(expected)
    for name, words in expected.items():
        [line] = [p for p in problems if p.startswith(f"{tmp_path / name}.")]
        assert words in line
        assert "\n" not in line


@pytest.mark.parametrize("cut", [1, 511, 512, 1024, 5000])
def test_any_truncation_is_detected(shard, cut):
    path, _ = shard
    os.truncate(path, max(path.stat().st_size - 10240 * (cut == 5000) - cut, 100))
    assert len(verify(str(path))) == 1


def test_tar_truncated_between_members_is_refused(shard):
    path, _ = shard
    index = build_index(str(path))
    end = min(at for at, _ in index.entry(5)[1].values()) - 512
    os.truncate(path, end)
    with pytest.raises(DataError, match="no end-of-archive mark"):
        build_index(str(path))


def test_compressed_tars_are_refused(tmp_path, make_image):
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="not a plain tar"):
        index_shards(str(tmp_path / "z.tar"))


def test_remote_shards_are_indexed_and_verified_in_place(shard):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/far/a.tar", shard[0].read_bytes())
    try:
        assert "unindexed" in verify("memory://far/a.tar")[0]
        index_shards("memory://far/*.tar")
        assert fs.exists("/far/a.index.jsonl")
        assert verify("memory://far/a.tar") == []
        fs.pipe_file("/far/a.tar", shard[0].read_bytes()[:-600])
        assert "truncated" in verify("memory://far/a.tar")[0] or "altered" in verify("memory://far/a.tar")[0]
    finally:
        fs.rm("/far", recursive=True)


def test_a_full_disk_is_reported_with_the_files_name(tmp_path, monkeypatch):
    """The system's own error names no file, or the temporary one."""

    def full(temporary, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([temporary] if "x" in str(path) else []))

    monkeypatch.setattr("bifrost.data.atomic.commit", full)
    monkeypatch.setattr("bifrost.data.write.commit", full)
    for name in ("x.tar", "other.tar"):
        with pytest.raises(OSError, match="No space left") as caught:
            write_shard(tmp_path / name, [("a", {"png": b"1", "txt": b"a"})])
        assert caught.value.filename == str(tmp_path / name)
        with pytest.raises(OSError, match="No space left") as caught:
            write_atomic(tmp_path / name, b"1")
        assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
