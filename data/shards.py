"""A data set: indexed WebDataset shards, local or behind an fsspec URL, read sample by sample."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from .errors import BadSample, DataError
from .index import (
    CAPTION_TYPE,
    Header,
    Index,
    Members,
    damaged,
    image_type,
    index_path,
    is_local,
    load_header,
    load_index,
)
from .transforms import clean_caption

THREADS = 32  # opening is waiting for the file system


@dataclass(frozen=True)
class RawSample:
    key: str
    image: bytes
    """The image file as stored."""
    caption: str
    extras: dict[str, bytes]
    """Members other than the image and the caption, by extension."""


def expand(spec: str | list[str]) -> list[str]:
    """Shards that a path, URL or list of them names, sorted: braces are counted out, wildcards matched.

    Raises DataError when a wildcard matches nothing or a shard is named twice.
    """
    shards: list[str] = []
    for one in [spec] if isinstance(spec, str) else spec:
        try:
            patterns = list(braceexpand(one))
        except ValueError as error:
            raise DataError(f"{one}: {error}; write ranges as {{00000..02047}}") from None
        for pattern in patterns:
            shards += _glob(pattern) if any(mark in pattern for mark in "*?[") else [pattern]
    if not shards:
        raise DataError("no shards named; give a path such as /data/train-{00000..00099}.tar")
    shards.sort()
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        if shard == after:
            raise DataError(f"{shard}: named twice; name each shard once")
        if not shard.endswith(".tar"):
            raise DataError(f"{shard}: not a shard; name plain .tar files, with braces or wildcards")
    return shards


def _glob(pattern: str) -> list[str]:
    fs, path = url_to_fs(pattern)
    found = [str(match) for match in fs.glob(path) if str(match).endswith(".tar")]
    if not found:
        raise DataError(f"{pattern}: no .tar matches; check the path, or make shards with `bifrost data ingest`")
    return found if is_local(pattern) else [fs.unstrip_protocol(match) for match in found]


def told(shards: list[str]) -> str:
    """Shards as an error names them."""
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"


def exists(url: str) -> bool:
    fs, path = url_to_fs(url)
    return fs.exists(path)


def open_dataset(spec: str | list[str], max_open: int = 64) -> Dataset:
    """Open indexed shards for reading.

    spec: path or fsspec URL, or several; `{00000..02047}` and wildcards are expanded. max_open: shards kept open.
    Raises DataError when a shard or its index is missing or does not fit, or when no shard holds a caption.
    """
    shards = expand(spec)
    with ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(_open_header, shards))
    if not any(header.samples for header in headers):
        raise DataError(f"{told(shards)}: no images; name shards that hold some")
    if not any(header.captions for header in headers):
        raise DataError(
            f"{told(shards)}: no captions (KEY.txt beside each image); make shards that hold some with"
            " `bifrost data ingest`"
        )
    return Dataset(shards, headers, max_open)


def _open_header(shard: str) -> Header:
    fs, path = url_to_fs(shard)
    try:
        size = fs.size(path)
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard; check the path, or make it with `bifrost data ingest`") from None
    try:
        header = load_header(shard)
    except FileNotFoundError:
        raise DataError(f"{shard}: no index beside it; run `bifrost data index {shard}`") from None
    if size != header.bytes:
        raise DataError(
            f"{shard}: {size} bytes, indexed as {header.bytes}: truncated or altered; restore it, or run"
            f" `bifrost data index {shard}` to accept it"
        )
    return header


class Dataset:
    """Random access to the samples of many shards.

    Local shards are read by position and remote ones by range, both without a shared cursor, so a fork may go on
    using what its parent opened.
    """

    def __init__(self, shards: list[str], headers: list[Header], max_open: int = 64) -> None:
        self.shards = shards
        self.headers = headers
        self.max_open = max_open
        self.samples_per_shard = np.array([header.samples for header in headers], dtype=np.int64)
        """Sample counts, int64 [S]."""
        self.fingerprint = hashlib.sha256("".join(header.sha256 for header in headers).encode()).hexdigest()
        """Hash over the shards' content hashes in order: the same samples in the same order, wherever they lie."""
        self._open: OrderedDict[int, tuple[Index, File]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def entry(self, shard: int, sample: int) -> tuple[str, Members]:
        """Key and members of one sample; raises DataError like `read`."""
        index, _ = self._opened(shard)
        try:
            return index.entry(sample)
        except ValueError:
            raise damaged(self.shards[shard]) from None

    def read(self, shard: int, sample: int) -> RawSample:
        """One sample, by numbers within the data set and the shard.

        Raises BadSample when its bytes are not all there or its caption is missing, empty or not UTF-8; DataError
        when the shard cannot be read at all.
        """
        key, members = self.entry(shard, sample)
        file = self._opened(shard)[1]
        start = min(offset for offset, _ in members.values())
        end = max(offset + size for offset, size in members.values())
        try:
            span = file.read(start, end - start)
        except OSError as error:
            raise DataError(f"{self.shards[shard]}: cannot be read ({error}); check the storage") from None
        if len(span) < end - start:
            raise BadSample(key, "the shard ends inside it")
        parts = {kind: span[offset - start : offset - start + size] for kind, (offset, size) in members.items()}
        image = image_type(members)
        assert image is not None, "only samples with an image are indexed"
        if CAPTION_TYPE not in parts:
            raise BadSample(key, "no caption")
        try:
            caption = clean_caption(parts[CAPTION_TYPE])
        except ValueError as error:
            raise BadSample(key, str(error)) from None
        extras = {kind: part for kind, part in parts.items() if kind not in (image, CAPTION_TYPE)}
        return RawSample(key, parts[image], caption, extras)

    def close(self) -> None:
        """Close every open shard; reading opens them again."""
        while self._open:
            self._open.popitem()[1][1].close()

    def _opened(self, shard: int) -> tuple[Index, File]:
        if shard not in self._open:
            url = self.shards[shard]
            try:
                index, file = load_index(url), open_file(url)
            except OSError as error:
                raise DataError(f"{url}: cannot be opened any more ({error}); check the storage") from None
            if index.header != self.headers[shard]:
                file.close()
                raise DataError(f"{index_path(url)}: changed since the data set was opened; start again")
            self._open[shard] = index, file
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)[1][1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors do not travel


class _LocalFile:
    def __init__(self, path: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 closed by the cache, or with the data set

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, start)

    def close(self) -> None:
        self.file.close()


class _RemoteFile:
    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, start: int, size: int) -> bytes:
        fs, path = url_to_fs(self.url)  # cached by fsspec, a fresh one after a fork
        return fs.cat_file(path, start=start, end=start + size)

    def close(self) -> None:
        pass


File = _LocalFile | _RemoteFile


def open_file(url: str) -> File:
    """A file to read by position."""
    return _LocalFile(url_to_fs(url)[1]) if is_local(url) else _RemoteFile(url)
