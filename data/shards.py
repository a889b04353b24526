"""A dataset: indexed WebDataset shards, local or behind an fsspec URL, with random access to samples."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from braceexpand import braceexpand

from .errors import BadSample, DataError, DataLost, DataMissing
from .files import File, OpenShards, content, is_local, open_file
from .index import (
    CAPTION_TYPE,
    Header,
    Index,
    Members,
    damaged,
    image_type,
    index_path,
    load_header,
    load_index,
)
from .local import is_kind
from .remote import filesystem, size_of
from .remote_file import RemoteFile
from .retry import call
from .retry import failure as storage_failure
from .transforms import clean_caption
from .transience import verdict
from .wildcards import matches

HELD_OUT = ("dev", "eval", "heldout", "test", "val", "valid", "validation")
"""First words of the names of held-out shards."""
NEAR = 1 << 20
"""Gap in bytes between an image and its caption up to which one read is cheaper than two."""
NOTHING_NAMED = "no shards named; give a path such as /data/train-{00000..00099}.tar"
THREADS = 32  # opening shards is bound by the latency of the file system
Gather = Callable[[Any], list[Any]]
"""All-gather of one value per rank, in rank order."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class RawSample:
    key: str
    image: bytes
    """The image file as stored."""
    caption: str


@dataclass(frozen=True)
class _Shard:
    index: Index
    file: File


class _WrongBytes(ConnectionError):
    pass


def expand(spec: str | list[str], mixed: bool = True) -> list[str]:
    """Sorted shards that a path, folder, URL or list of them names, with braces and wildcards expanded.

    A folder means the shards in it, not those in its subfolders. mixed: whether a folder may hold held-out shards
    together with others. Raises DataError when a folder or wildcard has no shards or a shard is named twice.
    """
    shards: list[str] = []
    for one in [spec] if isinstance(spec, str) else spec:
        if not one.strip():  # fsspec reads it as the current folder
            raise DataError(NOTHING_NAMED)
        try:
            # Wildcards need quotes, in which a shell does not expand `~`.
            patterns = [os.path.expanduser(pattern) for pattern in braceexpand(one)]
        except ValueError as error:
            raise DataError(f"{one}: {error}; write ranges as {{00000..02047}}") from None
        for pattern in patterns:
            shards += call(lambda pattern=pattern: _matches(pattern, mixed), pattern)
    if not shards:
        raise DataError(NOTHING_NAMED)
    shards.sort()
    for shard, after in zip(shards, [*shards[1:], None], strict=True):
        if shard == after:
            raise DataError(f"{shard}: named twice; name each shard once")
        if not shard.endswith(".tar"):
            raise DataError(
                f"{shard}: neither a shard nor a folder; name .tar files, with braces or wildcards, or their folder"
            )
    return shards


def _matches(pattern: str, mixed: bool) -> list[str]:
    fs, path = filesystem(pattern)
    local = is_local(pattern)
    if any(mark in pattern for mark in "*?["):
        found = {item["name"]: item for item in matches(path)} if local else fs.glob(path, detail=True)
        nothing = "no .tar matches"
    elif not pattern.endswith(".tar") and (is_kind(path, stat.S_ISDIR) if local else fs.isdir(path)):
        found, nothing = {item["name"]: item for item in fs.ls(path, detail=True)}, "a folder without .tar files"
        if not mixed:
            _refuse_mixture(pattern, list(found))
    else:
        return [pattern]
    shards = [
        str(name)
        for name, item in found.items()
        if str(name).endswith(".tar")
        and (item["type"] == "file" or item.get("islink"))  # opening a FIFO would block
        and not posixpath.basename(str(name)).startswith(".")
    ]
    if not shards:
        raise DataError(
            f"{pattern}: {nothing}{_seen_from(pattern)}; check the path, or make shards with `bifrost data ingest`"
        )
    return shards if local else [fs.unstrip_protocol(shard) for shard in shards]


def _seen_from(path: str) -> str:
    """The working directory of a relative path, for messages: a run may be resumed from another folder."""
    return "" if not is_local(path) or os.path.isabs(path) else f", relative to {os.getcwd()}"


def _refuse_mixture(folder: str, names: list[str]) -> None:
    """Raise DataError for a folder with held-out shards and others, so that held-out data is not trained on."""
    shards = [posixpath.basename(name) for name in names if name.endswith(".tar")]
    stems = [re.split(r"[-_.0-9]", shard)[0].lower() for shard in shards if not shard.startswith(".")]
    held_out = sorted({stem for stem in stems if stem in HELD_OUT})
    if held_out and len(others := sorted(set(stems))) > 1:
        sets = ", ".join(f"{stem}*.tar" for stem in others)
        example = f"{folder.rstrip('/')}/{others[-1]}*.tar"
        raise DataError(f"{folder}: holds several sets of shards ({sets}); name one, such as '{example}'")


def format_shards(shards: list[str]) -> str:
    """Shards as errors name them: the first, and the number of others."""
    return shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"


def open_dataset(
    spec: str | list[str],
    max_open: int = 64,
    *,
    rank: int = 0,
    gather: Gather = lambda value: [value],
    mixed: bool = False,
) -> Dataset:
    """Open indexed shards for reading.

    spec: path, folder or fsspec URL, or several; `{00000..02047}` and wildcards are expanded. max_open: shards kept
    open. mixed: whether a folder may hold held-out shards together with others. rank, gather: of the ranks that open
    the same dataset; each then checks its share of the shards. Raises DataError, on all ranks, when a shard or its
    index is missing or inconsistent, or when no shard has a caption.
    """
    shards: list[str] = shared(lambda: expand(spec, mixed) if rank == 0 else [], gather)[0]
    headers = spread(_open_header, shards, rank, gather)
    if not any(header.samples for header in headers):
        raise DataError(f"{format_shards(shards)}: no images; name shards that have some")
    if not any(header.captions for header in headers):
        raise DataError(
            f"{format_shards(shards)}: no captions (KEY.txt next to each image); make shards that have some with"
            " `bifrost data ingest`"
        )
    return Dataset(shards, headers, max_open)


def spread(work: Callable[[str], Result], shards: list[str], rank: int, gather: Gather) -> list[Result]:
    """Results of `work` on every shard, split among the ranks; an error of one rank is raised on all."""
    ranks = len(gather(None))

    def mine() -> list[Result]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, shards[rank::ranks]))

    found = shared(mine, gather)
    return [found[number % ranks][number // ranks] for number in range(len(shards))]


def shared(work: Callable[[], Result], gather: Gather) -> list[Result]:
    """The result of `work` on each rank; the first DataError of any rank is raised on all."""
    try:
        found, failure = work(), None
    except DataError as error:
        found, failure = None, error
    except Exception as error:
        if verdict(error) is None:
            raise
        found, failure = None, storage_failure("data.shards", error)
    outcomes = gather((found, failure))
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [result for result, _ in outcomes]


def _open_header(shard: str) -> Header:
    try:
        size = call(lambda: size_of(shard), shard)
        if is_local(shard):
            call(lambda: open(filesystem(shard)[1], "rb").close(), shard)  # an index may be readable without its shard
    except DataMissing:
        raise DataError(
            f"{shard}: no such shard{_seen_from(shard)}; check the path, or make it with `bifrost data ingest`"
        ) from None
    try:
        header = load_header(shard)
    except DataMissing:
        raise DataError(f"{shard}: no index next to it; run `bifrost data index {shard}`") from None
    if size is not None and size != header.bytes:  # some HTTP servers do not state it; it is then checked on read
        content(shard, 1)  # raises for a web page with the status of a shard
        raise DataError(
            f"{shard}: {size} bytes, indexed as {header.bytes}: truncated or altered; restore it, or run"
            f" `bifrost data index {shard}` to accept it"
        )
    return header


class Dataset:
    """Random access to the samples of many shards; a fork may keep using files that its parent opened."""

    def __init__(self, shards: list[str], headers: list[Header], max_open: int = 64) -> None:
        self.shards = shards
        self.headers = headers
        self.samples_per_shard = np.array([header.samples for header in headers], dtype=np.int64)
        """Sample counts, int64 [S]."""
        self.fingerprint = hashlib.sha256("".join(header.sha256 for header in headers).encode()).hexdigest()
        """Hash over the shards' content hashes in order: identifies samples and their order, wherever stored."""
        self.opened = OpenShards(shards, self._open, max_open)
        self._ends = self.samples_per_shard.cumsum()

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def place(self, index: int) -> tuple[int, int]:
        """Shard number, and number within the shard, of the sample with that number in the dataset."""
        shard = int(self._ends.searchsorted(index, side="right"))
        return shard, index - int(self._ends[shard]) + int(self.samples_per_shard[shard])

    def name(self, shard: int, key: str) -> str:
        """Globally unique name of a sample: its shard's content hash and its key, which other shards may use too."""
        return f"{self.headers[shard].sha256} {key}"

    def entry(self, shard: int, sample: int) -> tuple[str, Members]:
        """Key and members of one sample; raises DataError like `read`."""
        try:
            return self.opened.read(shard, lambda opened: opened.index.entry(sample))
        except ValueError as error:
            raise error if isinstance(error, DataError) else damaged(self.shards[shard]) from None

    def read(self, shard: int, sample: int) -> RawSample:
        """One sample, by shard number and number within the shard.

        Raises BadSample when it is truncated or its caption is missing, empty or not UTF-8; DataError when the shard
        cannot be read at all.
        """
        key, members = self.entry(shard, sample)
        parts: dict[str, bytes] = {}
        for wanted in _adjacent(members):
            parts |= self._members(shard, key, wanted)
        if CAPTION_TYPE not in parts:
            raise BadSample(key, "no caption")
        try:
            caption = clean_caption(parts[CAPTION_TYPE])
        except ValueError as error:
            raise BadSample(key, str(error)) from None
        return RawSample(key, parts[str(image_type(members))], caption)

    def spans(self, shard: int, sample: int) -> list[tuple[int, int]]:
        """Start and size in bytes of each range that `read` reads; raises DataError like `entry`."""
        return [_span(wanted) for wanted in _adjacent(self.entry(shard, sample)[1])]

    def _members(self, shard: int, key: str, wanted: Members) -> dict[str, bytes]:
        """Content of adjacent members from one read; each is checked against the tar header before it."""
        start, length = _span(wanted)

        def read(opened: _Shard) -> tuple[bytes, bool]:
            span = opened.file.read(start, length)
            misplaced = any(not _is_member(span, offset - start, size) for offset, size in wanted.values())
            if misplaced and len(span) == length and isinstance(opened.file, RemoteFile):
                raise _WrongBytes("the bytes do not match the index")  # retried: a proxy may have mixed them up
            return span, misplaced

        try:
            span, misplaced = self.opened.read(shard, read)
        except DataLost as error:
            if isinstance(error.__cause__, _WrongBytes):
                raise DataError(
                    f"{self.shards[shard]}: sample {key} is not at the offset in the index; run `bifrost data verify`,"
                    " then restore the shard or index it again"
                ) from error
            raise
        if len(span) < length:
            raise BadSample(key, "the shard ends inside it")
        if misplaced:
            raise BadSample(key, "it is not at the offset in the index")
        return {kind: span[offset - start : offset - start + size] for kind, (offset, size) in wanted.items()}

    def _open(self, shard: int) -> _Shard:
        url = self.shards[shard]
        index = load_index(url, self.opened.fetch)
        if index.header != self.headers[shard]:
            raise DataError(f"{index_path(url)}: changed since the dataset was opened; restart")
        return _Shard(index, open_file(url, index.header.bytes, self.opened.fetch))


def _adjacent(members: Members) -> list[Members]:
    """A sample's image and caption, grouped by the range that they are read with."""
    image = image_type(members)
    assert image is not None, "only samples with an image are indexed"
    wanted = {kind: members[kind] for kind in (image, CAPTION_TYPE) if kind in members}
    _, length = _span(wanted)
    if length <= sum(size for _, size in wanted.values()) + NEAR:
        return [wanted]
    # In the tar all images precede all captions, or one of the two is a link.
    return [{kind: place} for kind, place in wanted.items()]


def _span(wanted: Members) -> tuple[int, int]:
    """Start and length in bytes of the range from the tar header of the first member to the end of the last one."""
    start = min(offset for offset, _ in wanted.values()) - tarfile.BLOCKSIZE
    return start, max(offset + size for offset, size in wanted.values()) - start


def _is_member(span: bytes, offset: int, size: int) -> bool:
    """Whether the tar header before `offset` in `span` belongs to a member of `size` bytes."""
    header = span[offset - tarfile.BLOCKSIZE : offset]
    with suppress(ValueError):  # the usual form (POSIX pax, ustar), ten times as fast as tarfile
        sums = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if sums == int(header[148:154], 8) and size == int(header[124:135], 8):
            return True
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == size
    except tarfile.HeaderError:
        return False
