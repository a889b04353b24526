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

CHUNK = 450
"""Shards per listing request, which returns up to 1,000 files: each shard has an index."""
LAST = "\U0010ffff"
"""After all names."""
LOCAL, S3 = "file", "s3"
"""Protocols of file systems with states."""
State = tuple[int, int, int, int]
"""Size of the shard, its `modified`, size of the index, its `modified`: see `catalogue.STATES`."""


class Origin(NamedTuple):
    """A folder of shards, and its file system's kind."""

    folder: str
    """Path or URL, with the final slash; empty for the working directory."""
    path: str
    """The same in the file system, without the final slash."""
    kind: str

    def of(self, name: str) -> str:
        """A shard in the folder as fsspec's listings name it."""
        path = self.path if self.kind == LOCAL else filesystem(self.folder)[0].unstrip_protocol(self.path)
        return f"{path}/{name}"


def origin_of(folder: str) -> Origin:
    """The origin of a folder with the final slash; raises DataError for an unknown protocol."""
    fs, path = filesystem(folder or ".")
    return Origin(folder, path.rstrip("/"), protocol(fs))


def local_states(origin: Origin, names: Sequence[str]) -> list[State | None]:
    """The states of local shards; None where a file is missing or not readable."""
    return [_local_state(f"{origin.path}/{name}") for name in names]


def _local_state(path: str) -> State | None:
    def look() -> State:
        shard, index = os.stat(path), os.stat(index_path(path))
        if not os.access(path, os.R_OK):
            raise PermissionError
        return shard.st_size, shard.st_mtime_ns, index.st_size, index.st_mtime_ns

    try:
        return with_retries(look, path)
    except OSError:
        return None


class Listing(NamedTuple):
    """Part of a folder's listing."""

    states: list[State | None]
    """Of the shards asked for; None where a file is missing."""
    shards: list[str]
    """Names of all shards in this part."""


def listed_states(origin: Origin, names: Sequence[str], after: str = LAST, end: str = "") -> Listing:
    """The states of sorted shards of a folder on S3, from the part of its listing that contains them and all shards
    with names greater than `after` and less than `end`."""
    before = min(after, min(map(index_path, names))[:-1])
    end = max(end, names[-1])
    found: dict[str, Listed] = {}
    for page in _pages(origin.folder, before):
        found |= page
        if max(page, default="") >= end:
            break
    states = []
    for name in names:
        shard, index = found.get(name), found.get(index_path(name))
        states.append((shard.size, _stamp(shard), index.size, _stamp(index)) if shard and index else None)
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
