"""The state of shards and their indexes: sizes, and what changes whenever a file is written again.

On a local file system that is the modification time, on S3 the ETag. There, states are listed, up to a thousand files
per request; other storage has neither.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .index import index_path
from .local import with_retries
from .remote import Listed, ListingPage, filesystem, list_page, protocol
from .retry import call
from .shard_list import folder_of

CHUNK = 450
"""Shards per listing request, which returns up to 1,000 files: each shard has an index."""
LAST = "\U0010ffff"
"""After all names."""
LOCAL, S3 = "file", "s3"
"""Protocols of file systems with states."""
FileState = tuple[int, int]
"""Size of a file, its `modified`."""
State = tuple[int, int, int, int]
"""Size of the shard, its `modified`, size of the index, its `modified`: see `catalogue.STATES`."""


class Origin(NamedTuple):
    """A folder of shards, and its file system's kind."""

    folder: str
    """Path or URL, with the final slash; empty for the working directory."""
    path: str
    """The same in the file system, without the final slash."""
    kind: str
    index_dir: str | None = None
    """Folder of the indexes; None: next to the shards."""

    def of(self, name: str) -> str:
        """A shard in the folder as fsspec's listings name it."""
        path = self.path if self.kind == LOCAL else filesystem(self.folder)[0].unstrip_protocol(self.path)
        return f"{path}/{name}"


def origin_of(folder: str, index_dir: str | None = None) -> Origin:
    """The origin of a folder with the final slash, and of its indexes; raises DataError for an unknown protocol."""
    fs, path = filesystem(folder or ".")
    return Origin(folder, path.rstrip("/"), protocol(fs), index_dir)


def local_states(origin: Origin, names: Sequence[str]) -> list[State | None]:
    """The states of local shards; None where a file is missing or not readable."""
    shards = [_of_file(f"{origin.path}/{name}", readable=True) for name in names]
    if origin.index_dir:
        indexes = _apart(origin, names)
    else:
        indexes = [_of_file(index_path(f"{origin.path}/{name}")) for name in names]
    return [_joined(*pair) for pair in zip(shards, indexes, strict=True)]


def _of_file(path: str, readable: bool = False) -> FileState | None:
    """The state of a local file; None if it is missing, or has to be `readable` and is not."""

    def look() -> FileState:
        found = os.stat(path)
        if readable and not os.access(path, os.R_OK):
            raise PermissionError
        return found.st_size, found.st_mtime_ns

    try:
        return with_retries(look, path)
    except OSError:
        return None


def _joined(shard: FileState | None, index: FileState | None) -> State | None:
    return (*shard, *index) if shard and index else None


def _apart(origin: Origin, names: Sequence[str]) -> list[FileState | None]:
    """The states of indexes in `index_dir`, of shards in one folder; None where one is missing."""
    urls = [index_path(origin.folder + name, origin.index_dir) for name in names]
    folder, kind = folder_of(urls[0]), protocol(filesystem(urls[0])[0])
    if kind == LOCAL:
        return [_of_file(filesystem(url)[1]) for url in urls]
    if kind != S3:
        return [(0, 0)] * len(urls)
    files = [url.removeprefix(folder) for url in urls]
    found = _listed(folder, min(files)[:-1], max(files))
    return [_of_listed(found.get(file)) for file in files]


def _listed(folder: str, after: str, end: str) -> dict[str, Listed]:
    """Name -> file, from the pages of a folder's listing with the names greater than `after` up to `end`."""
    found: dict[str, Listed] = {}
    for page in _pages(folder, after):
        found |= page
        if max(page, default="") >= end:
            break
    return found


def _of_listed(found: Listed | None) -> FileState | None:
    return (found.size, _stamp(found)) if found else None


class Listing(NamedTuple):
    """Part of a folder's listing."""

    states: list[State | None]
    """Of the shards asked for; None where a file is missing."""
    shards: list[str]
    """Names of all shards in this part."""


def listed_states(origin: Origin, names: Sequence[str], after: str = LAST, end: str = "") -> Listing:
    """The states of sorted shards of a folder on S3, from the part of its listing that contains them and all shards
    with names greater than `after` and less than `end`."""
    before = min(after, min(index_path(name) for name in names)[:-1])
    found = _listed(origin.folder, before, max(end, names[-1]))
    shards = [_of_listed(found.get(name)) for name in names]
    indexes = _apart(origin, names) if origin.index_dir else [_of_listed(found.get(index_path(name))) for name in names]
    states = [_joined(*pair) for pair in zip(shards, indexes, strict=True)]
    return Listing(states, [name for name in found if name.endswith(".tar") and not name.startswith(".")])


def _pages(folder: str, after: str) -> Iterator[dict[str, Listed]]:
    token: str | None = None
    while True:
        page: ListingPage = call(lambda token=token: list_page(folder, after, token), folder)
        yield page.files
        if page.token is None:
            return
        token = page.token


def _stamp(listed: Listed) -> int:
    return int.from_bytes(hashlib.sha256(listed.tag.encode()).digest()[:8], "little", signed=True)
