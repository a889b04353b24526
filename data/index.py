"""The index of a shard: offsets of each sample's members, and a hash of the whole tar.

`train-00000.tar` has `train-00000.index.jsonl`, next to it or in a folder of indexes (`index_dir.py`). Its first line
is the header (`Header`), so that opening thousands of shards reads a few hundred bytes of each. Each further line is
one sample, in the tar's order: `["KEY", {"jpg": [offset, size], "txt": [offset, size]}, [width, height]]`, offsets and
sizes in bytes from the start of the tar, and width and height of the image in pixels, upright, or null if it does not
decode. Version 1 had no width and height.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .captions import CAPTION_TYPE
from .errors import DataError, DataMissing
from .files import Stream, content, is_local, write
from .index_dir import option, place_of
from .remote import Fetch, fetch, filesystem, size_of
from .retry import call
from .shard_list import seen_from
from .tars import Keep, ManyZeros, Member, TarInput, scan
from .transforms import clean_caption, image_size

VERSION = 2
WITHOUT_SIZES = 1
"""The version before, which is still read."""
TEXT_TYPES = ("txt", "json")
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
HEADER_LIMIT = 4096  # bytes; headers are about 300
Members = dict[str, tuple[int, int]]
ImageSize = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Header:
    """Summary of one shard."""

    version: int = field(compare=False)
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the whole tar, in hex."""
    samples: int
    """Samples: those that have an image, or a text in a shard of texts."""
    captions: int
    """Samples whose caption is usable."""
    caption_chars: tuple[int, int, int]
    """Minimum, maximum and total length of the usable captions, in characters."""
    image_bytes: int
    """Total size of the images; 0 of a shard that was indexed as texts."""

    @property
    def texts(self) -> bool:
        """Whether its samples have no images."""
        return self.samples > 0 and self.image_bytes == 0


@dataclass(frozen=True)
class Index:
    header: Header
    lines: list[bytes]
    """One JSON line per sample; parsed on access, so that 10,000 samples take about 1 MB."""
    left_out: list[tuple[str, str]] = field(default_factory=list, compare=False)
    """Key and reason of everything in the tar that is not a sample; not stored."""

    def entry(self, sample: int) -> tuple[str, Members]:
        """Key and members of one sample."""
        key, members, *_ = json.loads(self.lines[sample])
        return key, members

    @property
    def image_sizes(self) -> list[ImageSize | None] | None:
        """Of the samples' images, None for one that does not decode; None if the index has no sizes."""
        if self.header.version == WITHOUT_SIZES:
            return None
        sizes = (json.loads(line)[2] for line in self.lines)
        return [(size[0], size[1]) if size else None for size in sizes]

    def same_entries(self, other: Index) -> bool:
        """Whether both have the same samples, and the same sizes of images if both have some."""
        if self.header.version == other.header.version:
            return self.lines == other.lines
        return all(self.entry(sample) == other.entry(sample) for sample in range(len(self.lines)))

    def to_bytes(self) -> bytes:
        return b"\n".join([json.dumps(asdict(self.header)).encode(), *self.lines]) + b"\n"


def index_path(shard: str, index_dir: str | None = None) -> str:
    """`x.tar` -> `x.index.jsonl`, for paths and URLs; in `index_dir`, if there is one."""
    return place_of(shard, index_dir).removesuffix(".tar") + ".index.jsonl"


def split_key(name: str) -> tuple[str, str] | None:
    """Member name -> (key, lower-case extension) by WebDataset's rule: the key ends at the base name's first dot."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name, re.DOTALL)
    return (match.group(1), match.group(2).lower()) if match else None


def image_type(members: Mapping[str, object]) -> str | None:
    """The extension of a sample's image; None when it has none."""
    return next((kind for kind in IMAGE_TYPES if kind in members), None)


class Group(NamedTuple):
    """Members of a tar that share a key."""

    key: str
    members: Members
    kept: dict[str, Any]
    """Captions and sizes of images from the scan, by extension."""
    problem: str | None = None
    """Why they do not make a sample."""
    twice: bool = False
    """Whether the problem is a duplicate member."""


def group_members(found: Iterable[Member]) -> list[Group]:
    """Group a tar's members into samples, in the order of their first members.

    Consecutive members with one key are a sample, by WebDataset's rule. Later members with the same key
    (`tar cf x.tar *.jpg *.txt`) belong to the same sample, unless an extension repeats: then each run is a sample.
    """
    runs: list[Group] = []
    for member in found:
        split = split_key(member.name)
        if split is None:
            continue
        key, kind = split
        if not runs or runs[-1].key != key:
            runs.append(Group(key, {}, {}))
        run = runs[-1]
        if kind in run.members:
            before, _ = run.members[kind]
            what = f"member {member.name} appears twice, at bytes {before} and {member.offset}"
            runs[-1] = run._replace(problem=what, twice=True)
            continue
        if member.problem and (kind == CAPTION_TYPE or kind.rpartition(".")[2] in IMAGE_TYPES):
            runs[-1] = run._replace(problem=run.problem or f"member {member.name}: {member.problem}")
            continue
        run.members[kind] = (member.offset, member.size)
        if member.content is not None:
            run.kept[kind] = member.content
    return _joined(runs)


def _joined(runs: list[Group]) -> list[Group]:
    by_key: dict[str, list[Group]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    if len(by_key) == len(runs):
        return runs
    groups = []
    for run in runs:
        same = by_key[run.key]
        kinds = [kind for each in same for kind in each.members]
        if len(same) > 1 and len(set(kinds)) == len(kinds):
            if run is same[0]:
                members = {kind: place for each in same for kind, place in each.members.items()}
                kept = {kind: content for each in same for kind, content in each.kept.items()}
                problem = next((each.problem for each in same if each.problem), None)
                groups.append(Group(run.key, members, kept, problem, any(each.twice for each in same)))
        else:
            groups.append(run)
    return groups


def why_no_image(group: Group) -> str:
    """Why a group without an image is not a sample; names an extension such as .input.jpg, which is an image too."""
    if group.problem:
        return group.problem
    longer = sorted(kind for kind in group.members if kind.rpartition(".")[2] in IMAGE_TYPES)
    return f"no image: its image is .{longer[0]}" if longer else "no image"


def build_index(shard: str, texts: bool = False) -> Index:
    """Build the index of an existing tar in one pass; writes nothing. texts: its samples are texts, with any members
    that end in txt or json, in place of images.

    Raises DataError when the tar is missing, unreadable, damaged or truncated, or when a member appears twice; DataLost
    when the storage is unavailable.
    """
    lines, lengths, images, left_out = [], [], 0, []
    digest = hashlib.sha256()
    try:
        with Stream(shard) as raw:
            stream = TarInput(raw, digest)
            found = list(scan(stream, read_all=True, keep=_kept))
    except DataMissing:
        raise DataError(f"{shard}: no such shard; check the path") from None
    except ManyZeros as error:
        raise DataError(
            f"{shard}: {error} Copy it again; if they come from another blocking factor or `tar --concatenate`, make"
            " shards from it with `bifrost data ingest`"
        ) from None
    except tarfile.TarError as error:
        raise DataError(
            f"{shard}: truncated, damaged or not a plain tar ({error}); copy it again or leave it out"
        ) from None
    groups = group_members(found)
    if found and not groups:
        left_out.append((found[0].name, "no image"))
    for group in groups:
        kind = None if texts else image_type(group.members)
        if group.twice:
            raise DataError(f"{shard}: {group.problem}; keep one, or make new shards with `bifrost data ingest`")
        if group.problem or (not _has_text(group) if texts else kind is None):
            left_out.append((group.key, "no text" if texts and not group.problem else why_no_image(group)))
            continue
        lines.append(json.dumps([group.key, group.members, group.kept.get(kind) if kind else None]).encode())
        images += group.members[kind][1] if kind else 0
        try:
            lengths.append(len(clean_caption(group.kept.get(CAPTION_TYPE, b""))))
        except ValueError:
            continue
    chars = (min(lengths, default=0), max(lengths, default=0), sum(lengths))
    header = Header(VERSION, stream.position, digest.hexdigest(), len(lines), len(lengths), chars, images)
    return Index(header, lines, left_out)


def _has_text(group: Group) -> bool:
    return any(kind.rpartition(".")[2] in TEXT_TYPES for kind in group.members)


def _kept(name: str) -> Keep | None:
    """Of a caption everything is kept, of an image its width and height."""
    _, kind = split_key(name) or ("", "")
    return image_size if kind in IMAGE_TYPES else bytes if kind == CAPTION_TYPE else None


def save_index(shard: str, index: Index, index_dir: str | None = None) -> None:
    """Write the index of a shard, atomically. Raises DataError or DataLost when it cannot be written."""
    write(index_path(shard, index_dir), index.to_bytes())


def load_header(shard: str, index_dir: str | None = None) -> Header:
    """The header of a shard's index. Raises DataMissing without an index, DataLost when the storage is unavailable,
    DataError when the index is damaged."""
    return _parse_header(shard, content(index_path(shard, index_dir), HEADER_LIMIT), index_dir)


def open_header(shard: str, index_dir: str | None = None) -> Header:
    """The header of a shard's index, once the shard is there, readable and of the size in it. Raises DataError."""
    try:
        size = call(lambda: size_of(shard), shard)
        if is_local(shard):
            call(lambda: open(filesystem(shard)[1], "rb").close(), shard)  # an index may be readable without its shard
    except DataMissing:
        raise DataError(
            f"{shard}: no such shard{seen_from(shard)}; check the path, or make it with `bifrost data ingest`"
        ) from None
    try:
        header = load_header(shard, index_dir)
    except DataMissing:
        where = f"in {index_dir}" if index_dir else "next to it"
        raise DataError(f"{shard}: no index {where}; run {reindex(shard, index_dir)}") from None
    if size is not None and size != header.bytes:  # some HTTP servers do not state it; it is then checked on read
        content(shard, 1)  # raises for a web page with the status of a shard
        raise DataError(
            f"{shard}: {size} bytes, indexed as {header.bytes}: truncated or altered; restore it, or run"
            f" {reindex(shard, index_dir)} to accept it"
        )
    return header


def load_index(shard: str, get: Fetch = fetch, index_dir: str | None = None) -> Index:
    """The whole index of a shard. get: makes the request for a remote one. Raises like `load_header`."""
    data = content(index_path(shard, index_dir), get=get)
    header, lines = _parse_header(shard, data, index_dir), data.splitlines()[1:]
    if len(lines) != header.samples:
        raise damaged(shard, index_dir)
    return Index(header, lines)


def _parse_header(shard: str, data: bytes, index_dir: str | None) -> Header:
    try:
        values = json.loads(data.partition(b"\n")[0])
        if values["version"] in (VERSION, WITHOUT_SIZES):
            return Header(**{**values, "caption_chars": tuple(values["caption_chars"])})
    except (ValueError, TypeError, KeyError):
        raise damaged(shard, index_dir) from None
    raise DataError(
        f"{index_path(shard, index_dir)}: index version {values['version']}, expected {VERSION}; run"
        f" {reindex(shard, index_dir)}"
    )


def damaged(shard: str, index_dir: str | None = None) -> DataError:
    """The error for an index that does not parse."""
    return DataError(f"{index_path(shard, index_dir)}: damaged index; run {reindex(shard, index_dir)}")


def reindex(shard: str, index_dir: str | None) -> str:
    """The command that indexes a shard again, for messages."""
    return f"`bifrost data index {shard}{option(index_dir)}`"
