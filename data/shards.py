"""A dataset: indexed WebDataset shards, local or behind an fsspec URL, with random access to samples."""

from __future__ import annotations

import hashlib
import tarfile
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from .caption_choice import KEY_TXT, CaptionChoice
from .catalogue import Headers
from .catalogued import open_catalogued
from .errors import BadSample, DataError, DataLost
from .files import File, OpenShards, open_file
from .index import (
    CAPTION_TYPE,
    Header,
    Index,
    Members,
    damaged,
    image_type,
    index_path,
    load_index,
    open_header,
)
from .joined_headers import JoinedHeaders
from .remote_file import RemoteFile
from .required_members import require_members, require_source_images
from .shard_list import expand, format_shards
from .source_images import source_type
from .spread import Broadcast, Gather, from_first, spread
from .transforms import clean_caption

NEAR = 1 << 20
"""Gap in bytes between an image and its caption up to which one read is cheaper than two."""


@dataclass(frozen=True)
class RawSample:
    key: str
    image: bytes
    """The image file as stored."""
    caption: str
    caption_member: str = CAPTION_TYPE
    """Extension of the member that the caption is from."""
    source_image: bytes | None = None
    """Of an editing pair, the source image's file."""


@dataclass(frozen=True)
class _Shard:
    index: Index
    file: File


class _WrongBytes(ConnectionError):
    pass


def open_dataset(
    spec: str | list[str],
    max_open: int = 64,
    *,
    rank: int = 0,
    gather: Gather = lambda value: [value],
    broadcast: Broadcast | None = None,
    captions: CaptionChoice = KEY_TXT,
    index_dir: str | None = None,
    for_statistics: bool = False,
) -> Dataset:
    """Open indexed shards for reading.

    spec: path, folder or fsspec URL, or several; `{00000..02047}` and wildcards are expanded. max_open: shards kept
    open. captions: the members that captions are read from, and the use of source images. index_dir: folder of indexes
    and catalogues; None: next to the shards. for_statistics: a folder may hold held-out shards together with others,
    and there may be no captions.
    rank, gather, broadcast: of the ranks that open the same dataset; each then checks its share of the shards. Raises
    DataError, on all ranks, when a shard or its index is missing or inconsistent, when no shard has a caption, or when
    one of several members of `captions`, or a source image that these require, is not found.
    """
    catalogued = open_catalogued(spec, for_statistics, rank, gather, index_dir)
    if catalogued:
        shards, headers = catalogued
    else:
        shards = from_first(lambda: expand(spec, for_statistics), rank, gather, broadcast)
        headers = spread(lambda shard: open_header(shard, index_dir), shards, rank, gather)
    if not any(header.samples for header in headers):
        raise DataError(f"{format_shards(shards)}: no images; name shards that have some")
    dataset = Dataset(shards, headers, max_open, captions, index_dir)
    if for_statistics:
        return dataset
    if captions.only != CAPTION_TYPE:
        from_first(lambda: require_members(dataset), rank, gather, broadcast)
    elif not any(header.captions for header in headers):
        raise DataError(
            f"{format_shards(shards)}: no captions (KEY.txt next to each image); make shards that have some with"
            " `bifrost data ingest`"
        )
    first = next(number for number, header in enumerate(headers) if header.samples)
    if headers[first].texts and captions.images == "required":
        raise _only_texts(shards[first])
    if captions.source_images == "required":
        from_first(lambda: require_source_images(dataset), rank, gather, broadcast)
    return dataset


def _only_texts(shard: str) -> DataError:
    return DataError(f"{shard}: indexed as texts, which only sources with task=understanding read")


class Dataset:
    """Random access to the samples of many shards; a fork may keep using files that its parent opened."""

    def __init__(
        self,
        shards: list[str],
        headers: list[Header] | Headers | JoinedHeaders,
        max_open: int = 64,
        captions: CaptionChoice = KEY_TXT,
        index_dir: str | None = None,
    ) -> None:
        self.shards = shards
        self.headers = headers
        self.captions = captions
        self.index_dir = index_dir
        if isinstance(headers, Headers):
            samples, hashes = headers.samples, headers.hexadecimal()
        else:
            samples, hashes = [each.samples for each in headers], (each.sha256 for each in headers)
        self.samples_per_shard = np.array(samples, dtype=np.int64)
        """Sample counts, int64 [S]."""
        digest = hashlib.sha256()
        for each in hashes:
            digest.update(each.encode())
        self.fingerprint = digest.hexdigest()
        """Hash over the shards' content hashes in order: identifies samples and their order, wherever stored."""
        self.opened = OpenShards(shards, self._open, max_open)
        self._ends = self.samples_per_shard.cumsum()

    def __len__(self) -> int:
        return int(self.samples_per_shard.sum())

    def place(self, index: int) -> tuple[int, int]:
        """Shard number, and number within the shard, of the sample with that number in the dataset."""
        shard = int(self._ends.searchsorted(index, side="right"))
        return shard, index - int(self._ends[shard]) + int(self.samples_per_shard[shard])

    def index_path(self, shard: int) -> str:
        """Path or URL of a shard's index."""
        return index_path(self.shards[shard], self.index_dir)

    def source(self, shard: int) -> int:
        """Number of the source that a shard belongs to: always 0, except in a mixture."""
        return 0

    def source_shards(self, shard: int) -> range:
        """The shards of the same source."""
        return range(len(self.shards))

    def choice(self, shard: int) -> CaptionChoice:
        """What chooses among the captions of a shard's samples."""
        return self.captions

    def name(self, shard: int, key: str, caption_member: str = CAPTION_TYPE) -> str:
        """Globally unique name of a sample: its shard's content hash and its key, which other shards may use too. With
        a caption from another member than KEY.txt, it is that member's name."""
        member = "" if caption_member == CAPTION_TYPE else f".{caption_member}"  # a key ends at its first dot
        return f"{self.headers[shard].sha256} {key}{member}"

    def entry(self, shard: int, sample: int) -> tuple[str, Members]:
        """Key and members of one sample; raises DataError like `read`."""
        try:
            return self.opened.read(shard, lambda opened: opened.index.entry(sample))
        except ValueError as error:
            raise error if isinstance(error, DataError) else damaged(self.shards[shard], self.index_dir) from None

    def caption_member(self, shard: int, sample: int, epoch: int, index: int) -> str | None:
        """Extension of the caption that `read` reads; None if the sample has none. Raises DataError like `entry`."""
        choice = self.choice(shard)
        return choice.only or choice.among(self.entry(shard, sample)[1], epoch, index)

    def read(self, shard: int, sample: int, epoch: int = 0, index: int = 0) -> RawSample:
        """One sample, by shard number and number within the shard. epoch, index: of the planned sample, for which one
        of several captions is drawn.

        Raises BadSample when it is truncated, its caption is missing, empty or not UTF-8, or a source image that is
        required is missing; DataError when the shard
        cannot be read at all.
        """
        key, members = self.entry(shard, sample)
        return self._sample(shard, key, members, self.choice(shard).among(members, epoch, index))

    def read_any(self, shard: int, sample: int) -> RawSample:
        """`read`, with the first of its captions that is usable."""
        key, members = self.entry(shard, sample)
        problem = BadSample(key, "no caption")
        for kind in self.choice(shard).weights:
            try:
                return self._sample(shard, key, members, kind if kind in members else None)
            except BadSample as error:
                problem = error
        raise problem

    def _sample(self, shard: int, key: str, members: Members, kind: str | None) -> RawSample:
        """The sample with the caption of extension `kind`; None: BadSample, once the image was read."""
        parts: dict[str, bytes] = {}
        for wanted in _adjacent(members, self._read_kinds(shard, members, kind)):
            parts |= self._members(shard, key, wanted)
        if kind is None:
            raise BadSample(key, "no caption")
        source, image = source_type(parts), image_type(parts)
        if source is None and self.choice(shard).source_images == "required":
            raise BadSample(key, "no source image")
        try:
            caption = clean_caption(parts[kind])
        except ValueError as error:
            raise BadSample(key, str(error)) from None
        return RawSample(key, parts[image] if image else b"", caption, kind, parts[source] if source else None)

    def _read_kinds(self, shard: int, members: Members, caption: str | None) -> list[str]:
        """Extensions of the members that are read of a sample: the image, caption and source image in use."""
        choice = self.choice(shard)
        source = None if choice.source_images == "ignored" else source_type(members)
        image = None if choice.images == "ignored" else image_type(members)
        if image is None and choice.images == "required":
            raise _only_texts(self.shards[shard])
        return [kind for kind in (image, caption, source) if kind is not None]

    def spans(self, shard: int, sample: int, epoch: int = 0, index: int = 0) -> list[tuple[int, int]]:
        """Start and size in bytes of each range that `read` reads; raises DataError like `entry`."""
        members = self.entry(shard, sample)[1]
        kinds = self._read_kinds(shard, members, self.choice(shard).among(members, epoch, index))
        return [_span(wanted) for wanted in _adjacent(members, kinds)]

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
        index = load_index(url, self.opened.fetch, self.index_dir)
        if index.header != self.headers[shard]:
            name = self.index_path(shard)
            stale = None if isinstance(self.headers, list) else self.headers.stale(shard, name)
            raise stale or DataError(f"{name}: changed since the dataset was opened; restart")
        return _Shard(index, open_file(url, index.header.bytes, self.opened.fetch))


def _adjacent(members: Members, kinds: list[str]) -> list[Members]:
    """The members with these extensions, grouped by the range that they are read with."""
    if not kinds:  # an image that is not read, and no caption
        return []
    wanted = {kind: members[kind] for kind in kinds}
    _, length = _span(wanted)
    if length <= sum(size for _, size in wanted.values()) + NEAR:
        return [wanted]
    # In the tar all images precede all captions, or one of them is a link.
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
