"""The index beside every shard: where each sample's members lie, and a hash of the whole tar.

`train-00000.tar` has `train-00000.index.jsonl`. Its first line is the header (`Header`), so that opening thousands of
shards reads a few hundred bytes of each. Every further line is one sample, in the tar's order:
`["KEY", {"jpg": [offset, size], "txt": [offset, size]}]`, offsets and sizes in bytes from the start of the tar.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO

from .errors import DataError, DataMissing
from .files import Stream, content, is_local, write_atomic
from .remote import filesystem
from .retry import call
from .transforms import clean_caption

VERSION = 1
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CAPTION_TYPE = "txt"
HEADER_LIMIT = 4096  # bytes; headers are about 300
Members = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Header:
    """What one shard holds, without its samples."""

    version: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the whole tar, in hex."""
    samples: int
    """Samples that have an image."""
    captions: int
    """Samples whose caption is usable."""
    caption_chars: tuple[int, int, int]
    """Shortest, longest and summed length of the usable captions, in characters."""
    image_bytes: int
    """Summed size of the images."""


@dataclass(frozen=True)
class Index:
    header: Header
    lines: list[bytes]
    """One JSON line a sample; parsed when asked for, which keeps ten thousand samples at a megabyte."""

    def entry(self, sample: int) -> tuple[str, Members]:
        """Key and members of one sample."""
        key, members = json.loads(self.lines[sample])
        return key, members

    def to_bytes(self) -> bytes:
        return b"\n".join([json.dumps(asdict(self.header)).encode(), *self.lines]) + b"\n"


def index_path(shard: str) -> str:
    """`x.tar` -> `x.index.jsonl`, for paths and URLs."""
    return shard.removesuffix(".tar") + ".index.jsonl"


def split_key(name: str) -> tuple[str, str] | None:
    """Member name -> (key, lower-case extension) by WebDataset's rule: the key ends at the base name's first dot."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name, re.DOTALL)
    return (match.group(1), match.group(2).lower()) if match else None


def image_type(members: Mapping[str, object]) -> str | None:
    """The extension of a sample's image; None when it has none."""
    return next((kind for kind in IMAGE_TYPES if kind in members), None)


def group_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Members, dict[str, bytes]]]:
    """Samples of an open tar: (key, members, captions read on the way), consecutive members of one key together."""
    key, members, texts = "", {}, {}
    for info in tar:
        split = split_key(info.name) if info.isreg() and not info.issparse() else None
        if split is None:
            continue
        if split[0] != key and members:
            yield key, members, texts
            members, texts = {}, {}
        key, kind = split
        if kind in members:
            raise tarfile.ReadError(f"member {info.name} appears twice")
        members[kind] = (info.offset_data, info.size)
        if kind == CAPTION_TYPE:
            stream = tar.extractfile(info)
            assert stream is not None, "a regular member has data"
            texts[kind] = stream.read()
    if members:
        yield key, members, texts


class _Hashing:
    """A read-only stream that hashes what passes and remembers its end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.hash, self.size, self.tail = raw, hashlib.sha256(), 0, b""

    def read(self, size: int) -> bytes:
        data = self.raw.read(size)
        self.hash.update(data)
        self.size += len(data)
        self.tail = (self.tail + data)[-1024:]
        return data


def build_index(shard: str) -> Index:
    """Index of an existing tar, in one pass over it; nothing is written.

    Raises DataError when the tar is missing, damaged or cut short.
    """
    lines, lengths, images = [], [], 0
    try:
        with Stream(shard) as raw:
            stream = _Hashing(raw)  # pyright: ignore[reportArgumentType]
            with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:  # pyright: ignore
                for key, members, texts in group_members(tar):
                    kind = image_type(members)
                    if kind is None:
                        continue
                    lines.append(json.dumps([key, members]).encode())
                    images += members[kind][1]
                    try:
                        lengths.append(len(clean_caption(texts.get(CAPTION_TYPE, b""))))
                    except ValueError:
                        continue
            while stream.read(1 << 20):
                pass
    except DataMissing:
        raise DataError(f"{shard}: no such shard; check the path") from None
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard}: truncated or not a plain tar ({error}); copy it again or leave it out") from None
    if stream.tail.strip(b"\0") or stream.size < 1024:
        raise DataError(f"{shard}: truncated (no end-of-archive mark); copy it again or leave it out")
    chars = (min(lengths, default=0), max(lengths, default=0), sum(lengths))
    header = Header(VERSION, stream.size, stream.hash.hexdigest(), len(lines), len(lengths), chars, images)
    return Index(header, lines)


def save_index(shard: str, index: Index) -> None:
    """Write the index beside its shard, whole or not at all. DataError or DataLost where nothing can be written."""
    url = index_path(shard)
    fs, path = filesystem(url)
    data = index.to_bytes()
    call(lambda: write_atomic(path, data) if is_local(shard) else fs.pipe_file(path, data), url)


def load_header(shard: str) -> Header:
    """The header of a shard's index. DataMissing without an index, DataLost when storage is away, DataError when the
    index is damaged."""
    return _parse_header(shard, content(index_path(shard), HEADER_LIMIT))


def load_index(shard: str) -> Index:
    """The whole index of a shard; raises like `load_header`."""
    data = content(index_path(shard))
    header, lines = _parse_header(shard, data), data.splitlines()[1:]
    if len(lines) != header.samples:
        raise damaged(shard)
    return Index(header, lines)


def _parse_header(shard: str, data: bytes) -> Header:
    try:
        values = json.loads(data.partition(b"\n")[0])
        if values["version"] == VERSION:
            return Header(**{**values, "caption_chars": tuple(values["caption_chars"])})
    except (ValueError, TypeError, KeyError):
        raise damaged(shard) from None
    raise DataError(
        f"{index_path(shard)}: index version {values['version']}, this is {VERSION}; run `bifrost data index {shard}`"
    )


def damaged(shard: str) -> DataError:
    """The error for an index that does not parse."""
    return DataError(f"{index_path(shard)}: damaged index; run `bifrost data index {shard}`")
