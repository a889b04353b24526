"""Damage to a tar is reported, or has no effect."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from bifrost.data import DataError, index_shards, open_dataset, verify, write_shard
from bifrost.data.index import build_index
from bifrost.data.ingest import ingest


def samples_of(tar: Path) -> list[tuple]:
    """Every sample with the hashes of its members."""
    index, data = build_index(str(tar)), tar.read_bytes()
    found = []
    for number in range(index.header.samples):
        key, members = index.entry(number)
        found.append(
            (key, {kind: hashlib.sha256(data[at : at + size]).hexdigest() for kind, (at, size) in members.items()})
        )
    return found


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def small(tmp_path, make_image):
    """A tar whose third sample has an empty caption: a header without content."""
    path = tmp_path / "whole.tar"
    image = make_image(0, "jpg", (8, 8))
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("a", "b" * 120, "ü", "d"):  # one name needs an extended header, one is not ASCII
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.txt", b"" if key == "ü" else key.encode())
    return path


def is_reported(damaged: Path, expected: list[tuple]) -> bool:
    """Whether the damage is reported; fails when it is not but the samples differ."""
    try:
        found = samples_of(damaged)
    except DataError as error:
        assert str(damaged) in str(error) and "\n" not in str(error)
        return True
    assert found == expected
    return False


def test_every_truncation_is_reported(small, tmp_path):
    data, expected, cut = small.read_bytes(), samples_of(small), tmp_path / "cut.tar"
    unnamed = 0
    for size in range(512, len(data), 512):
        cut.write_bytes(data[:size])
        unnamed += not is_reported(cut, expected)
        cut.write_bytes(data[: size - 100])
        unnamed += not is_reported(cut, expected)
    end = len(data.rstrip(b"\0"))
    assert unnamed <= (len(data) - end) // 512 * 2, "only padding may go unnoticed"


def test_every_flipped_header_bit_is_reported_or_harmless(small, tmp_path):
    data, expected, flipped = small.read_bytes(), samples_of(small), tmp_path / "flipped.tar"
    with tarfile.open(small) as tar:
        header = tar.getmembers()[-1].offset  # of the last member: everything after the damage matters
        middle = tar.getmembers()[3].offset
    named = 0
    for at in range(512):
        for start, bit in ((middle, at % 8), (header, (at + 3) % 8)):
            changed = bytearray(data)
            changed[start + at] ^= 1 << bit
            flipped.write_bytes(changed)
            named += is_reported(flipped, expected)
    assert named > 1000, "all but padding within the checksum"


def test_every_zeroed_range_between_members_is_reported(small, tmp_path):
    data, expected, zeroed = small.read_bytes(), samples_of(small), tmp_path / "zeroed.tar"
    with tarfile.open(small) as tar:
        starts = [member.offset for member in tar.getmembers()]
    for first in starts:
        for end in [*(start for start in starts if start > first), first + 512]:
            zeroed.write_bytes(data[:first] + bytes(end - first) + data[end:])
            assert is_reported(zeroed, expected)


def test_zeros_at_the_end_are_not_padding(small, tmp_path):
    path = tmp_path / "preallocated.tar"
    data = small.read_bytes()
    write_shard(tmp_path / "large.tar", [(str(i), {"jpg": bytes(range(256)) * 40, "txt": b"x"}) for i in range(9)])
    large = (tmp_path / "large.tar").read_bytes()
    path.write_bytes(large[:20_480] + bytes(len(large) - 20_480))
    with pytest.raises(DataError, match=r"byte \d+: \d+ zeros to the end of the file, more than the padding of a tar"):
        build_index(str(path))
    path.write_bytes(data + b"garbage")
    with pytest.raises(DataError, match="more content up to byte"):
        build_index(str(path))
    path.write_bytes(bytes(100_000))
    with pytest.raises(DataError, match="byte 0: 100000 zeros"):
        build_index(str(path))


def test_ingest_rejects_an_incomplete_sample_before_zeros(tmp_path, make_image):
    path, out = tmp_path / "in/p.tar", tmp_path / "out"
    image, description = make_image(0, "png", (40, 40)), b'{"text": "another caption"}'
    write_shard(path, [(f"k{i}", {"png": image, "json": description, "txt": b"the caption"}) for i in range(9)])
    data = path.read_bytes()
    index = build_index(str(path))
    at, _ = index.entry(4)[1]["txt"]
    path.write_bytes(data[: at - 512] + bytes(len(data) - at + 512))
    assert ingest(path.parent, out, processes=1) == (1, 4, 2)
    dataset = open_dataset(str(out))
    assert {dataset.read(0, number).caption for number in range(4)} == {"the caption"}


@pytest.mark.parametrize("padded", [True, False])
def test_concatenated_tars_are_reported(tmp_path, make_image, padded):
    for number in range(2):
        write_shard(
            tmp_path / f"{number}.tar", [(f"{number}{i}", {"png": make_image(i), "txt": b"x"}) for i in range(8)]
        )
    joined, out = tmp_path / "in/joined.tar", tmp_path / "out"
    joined.parent.mkdir()
    first = (tmp_path / "0.tar").read_bytes()
    end = len(first.rstrip(b"\0")) // 512 * 512 + 512
    joined.write_bytes((first if padded else first[:end] + bytes(1024)) + (tmp_path / "1.tar").read_bytes())
    with pytest.raises(DataError, match=r"byte \d+: end-of-archive mark, but more content .*joined without"):
        index_shards(str(joined))
    assert "more content" in verify(str(joined))[0]
    made = ingest(joined.parent, out, processes=1)
    assert made.samples == 7, "the sample next to the damage is not trusted"
    assert "more content up to byte" in (out / "rejected.jsonl").read_text()


def test_archives_concatenated_by_gnu_tar(tmp_path, make_image):
    for number in range(2):
        write_shard(
            tmp_path / f"{number}.tar", [(f"{number}{i}", {"png": make_image(i), "txt": b"x"}) for i in range(8)]
        )
    subprocess.run(["tar", "-A", "-f", tmp_path / "0.tar", tmp_path / "1.tar"], check=True)
    # It leaves up to two records of zeros, as an incomplete download may: everything is read, with a warning.
    with pytest.raises(DataError, match=r"byte 49152: 12288 zeros .* make shards from it with `bifrost data ingest`"):
        index_shards(str(tmp_path / "0.tar"))
    assert ingest(str(tmp_path / "0.tar"), tmp_path / "out/shards", processes=1) == (1, 16, 1)


def test_compressed_files_are_detected_by_content(tmp_path, small):
    for name, data in {
        "gzip": gzip.compress(small.read_bytes()),
        "xz": lzma.compress(small.read_bytes()),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(range(200)) * 9,
        "zip": b"PK\x03\x04" + bytes(range(200)) * 9,
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(DataError, match=f"not a plain tar but {name}: .* unpack it"):
            index_shards(str(tmp_path / f"{name}.tar"))
        with pytest.raises(DataError, match=f"not a plain tar but {name}"):
            ingest(str(tmp_path / f"{name}.tar"), tmp_path / f"out-{name}")


def test_links_have_the_content_of_their_target(tmp_path, make_image):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "d", type=tarfile.DIRTYPE)
        add(tar, "d/a.png", make_image(1))
        add(tar, "d/a.txt", b"one")
        add(tar, "d/b.png", type=tarfile.LNKTYPE, linkname="d/a.png")
        add(tar, "d/b.txt", b"two")
        add(tar, "d/c.png", make_image(3))
        add(tar, "d/c.txt", type=tarfile.SYMTYPE, linkname="../d/a.txt")
        add(tar, "d/e.png", type=tarfile.SYMTYPE, linkname="/elsewhere/e.png")
        add(tar, "d/e.txt", b"lost")
        add(tar, "fifo.png", type=tarfile.FIFOTYPE)
    assert index_shards(str(path))[0][1].captions == 3
    dataset = open_dataset(str(path))
    read = [dataset.read(0, number) for number in range(3)]
    assert [(raw.key, raw.image, raw.caption) for raw in read] == [
        ("d/a", make_image(1), "one"),
        ("d/b", make_image(1), "two"),
        ("d/c", make_image(3), "one"),
    ]
    assert dict(build_index(str(path)).left_out) == {
        "d/e": "member d/e.png: it is a link to /elsewhere/e.png, which is not an earlier file in the tar",
        "fifo": "member fifo.png: it is neither a file nor a link",
    }


def test_sparse_members_are_reported(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 1 << 20)
    (tmp_path / "a.txt").write_text("x")
    for form in ("gnu", "posix"):
        subprocess.run(
            ["tar", "--sparse", f"--format={form}", "-cf", "s.tar", "a.png", "a.txt"], cwd=tmp_path, check=True
        )
        with pytest.raises(DataError, match=r"no member ends in|sparse"):
            index_shards(str(tmp_path / "s.tar"))
        assert "sparse" in build_index(str(tmp_path / "s.tar")).left_out[0][1]


def test_separated_members_are_one_sample(tmp_path, make_image):
    path, out = tmp_path / "in/by-type.tar", tmp_path / "out"
    path.parent.mkdir()
    keys = [f"k{i}" for i in range(5)]
    with tarfile.open(path, "w") as tar:  # as by `tar cf by-type.tar *.png *.txt`
        for number, key in enumerate(keys):
            add(tar, f"{key}.png", make_image(number))
        add(tar, "far.bin", bytes(2 << 20))
        for key in keys:
            add(tar, f"{key}.txt", f"text of {key}".encode())
    [(_, header)] = index_shards(str(path))
    assert (header.samples, header.captions) == (5, 5)
    assert ingest(path.parent, out, processes=1) == (1, 5, 1)
    for dataset in (open_dataset(str(path)), open_dataset(str(out))):
        read = [dataset.read(0, number) for number in range(5)]
        assert [(raw.key, raw.image, raw.caption) for raw in read] == [
            (key, make_image(number), f"text of {key}") for number, key in enumerate(keys)
        ]


def test_repeated_key_is_another_sample(tmp_path, make_image):
    path, out = tmp_path / "in/again.tar", tmp_path / "out"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        add(tar, "a.txt", b"without image")
        for number in range(3):
            add(tar, "a.png" if number else "b.png", make_image(number))
            add(tar, "a.txt" if number else "b.txt", f"text {number}".encode())
            add(tar, f"between{number}.json", b"{}")
    found = ingest(path.parent, out, processes=1)
    dataset = open_dataset(str(out))
    read = {dataset.read(0, number) for number in range(3)}
    assert {(raw.image, raw.caption) for raw in read} == {(make_image(i), f"text {i}") for i in range(3)}
    assert len({raw.key for raw in read}) == 3
    assert found.samples + found.rejected == 7


def test_tar_of_names_without_extensions_is_not_empty(tmp_path, make_image):
    path = tmp_path / "names.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "photo", make_image(1))
    with pytest.raises(DataError, match=r"no member ends in \.jpg"):
        index_shards(str(path))


def test_duplicate_member_is_reported(tmp_path, make_image):
    path = tmp_path / "in/twice.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", "a.png", "a.txt", "b.png", "b.txt"):
            add(tar, name, make_image(1) if name.endswith("png") else b"text")
    with pytest.raises(DataError, match=r"member a\.png appears twice, at bytes 512 and \d+; keep one") as caught:
        index_shards(str(path))
    assert "truncated" not in str(caught.value)
    assert ingest(path.parent, tmp_path / "out", processes=1) == (1, 1, 1)
