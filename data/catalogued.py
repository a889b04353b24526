"""Opening a data set from the catalogues of its folders, without a request per shard."""

from __future__ import annotations

import logging
import posixpath
import random
import re
import stat
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from fsspec.utils import glob_translate

from .catalogue import FIELDS, NAME, Catalogue, Headers, folder_name, load, load_if_readable
from .catalogue_state import CHUNK, LOCAL, S3, Origin, State, listed_states, local_states, origin_of
from .errors import DataError, DataLost
from .index import open_header
from .local import is_kind, names_in
from .shard_list import check_sorted, expand, folder_of, has_wildcard, is_shard, patterns, refuse_mixture
from .spread import Gather, shared, spread

log = logging.getLogger(__name__)
MOST_LISTED = 2000
"""Shards between the first and the last one named, up to which a part of the listing is read."""
MOST_FOLDERS = 16
"""A data set in more folders is opened without catalogues."""


class Catalogued(NamedTuple):
    """A data set that catalogues describe."""

    shards: list[str]
    headers: Headers


@dataclass
class _Part:
    """What is named of one folder."""

    catalogue: Catalogue
    origin: Origin
    names: list[str]
    """Single shards and wildcards; empty for the whole folder."""
    shards: list[str]
    """Paths or URLs of the selected shards."""
    rows: np.ndarray
    """Of the selected shards in the catalogue, int64, ascending."""
    missing: list[str]
    """Names that the catalogue lacks."""

    def row(self, name: str) -> int | None:
        """A shard's row in the catalogue, if it is there."""
        row = bisect_left(self.catalogue.names, name)
        return row if row < len(self.catalogue.names) and self.catalogue.names[row] == name else None

    @property
    def open_ended(self) -> bool:
        """Whether a folder or wildcard is named, which shards that are added belong to."""
        return any(not is_shard(name) for name in self.names)

    def require_same(self, listed: set[str], known: set[str]) -> None:
        """DataError for a shard of a folder or wildcard that is in only one of the sets."""
        for name in sorted(listed ^ known):
            if any(_matches(each, name) for each in self.names if not is_shard(each)):
                raise self.catalogue.stale(f"{name} was {'added' if name in listed else 'removed'}")


class _Chunk(NamedTuple):
    """Consecutive shards of a part, whose states are checked together."""

    part: int
    start: int
    stop: int


def open_catalogued(spec: str | list[str], mixed: bool, rank: int, gather: Gather) -> Catalogued | None:
    """The shards and headers of a data set whose folders have catalogues; None without them.

    Each rank reads the catalogues, and checks its share of the shards: on local file systems and S3 sizes and
    modification of shards and indexes, elsewhere one shard; a data set compares the others when it opens them. Raises
    DataError, on all ranks, when a catalogue is damaged or stale.
    """
    named = _by_folder(spec)
    if named is None:
        return None
    found: list[Catalogue] = []

    def first() -> list[str] | None:
        if rank == 0:
            found.extend(_load_all(list(named)))
        return [each.sha256 for each in found] or None

    hashes = shared(first, gather)[0]
    if hashes is None:
        return None

    def others() -> None:
        if rank:
            found.extend(load(folder + NAME) for folder in named)
        for each, expected in zip(found, hashes, strict=True):
            if each.sha256 != expected:
                raise DataError(f"{each.url}: rank {rank} reads another catalogue than rank 0; copy the data set anew")

    shared(others, gather)
    parts = [_select(each, names, mixed) for each, names in zip(found, named.values(), strict=True)]
    _check(parts, rank, gather)
    shards = [shard for part in parts for shard in part.shards]
    rows = np.concatenate([part.rows for part in parts])
    owners = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    if any(shard > after for shard, after in pairwise(shards)):
        order = sorted(range(len(shards)), key=shards.__getitem__)
        shards, rows, owners = [shards[number] for number in order], rows[order], owners[order]
    check_sorted(shards)
    return Catalogued(shards, Headers(found, owners, rows))


def _by_folder(spec: str | list[str]) -> dict[str, list[str]] | None:
    """Names in each folder, by folder with the final slash; "" names a whole folder. None when the names do not show
    which folders these are."""
    named: dict[str, list[str]] = {}
    for pattern in patterns(spec):
        if is_shard(pattern) or has_wildcard(pattern):
            folder, name = folder_of(pattern), posixpath.basename(pattern)
        else:
            folder, name = f"{pattern.rstrip('/')}/", ""
        if has_wildcard(folder) or "**" in name or "::" in pattern or folder.endswith(":/"):
            return None
        named.setdefault(folder, []).append(name)
        if len(named) > MOST_FOLDERS:
            return None
    return named or None


def _load_all(folders: list[str]) -> list[Catalogue]:
    """The folders' catalogues; none unless all have one."""
    found: list[Catalogue] = []
    for folder in folders:
        catalogue = load_if_readable(folder + NAME)
        if catalogue is None:
            if found:
                log.warning("%s has no catalogue, unlike %s: opening every shard", folder, found[0].url)
            return []
        found.append(catalogue)
    return found


def _select(catalogue: Catalogue, names: list[str], mixed: bool) -> _Part:
    folder = catalogue.url.removesuffix(NAME)
    part = _Part(catalogue, origin_of(folder), names, [], np.empty(0, dtype=np.int64), [])
    chosen: list[int] = []
    for name in names:
        if is_shard(name):
            row = part.row(name)
            if row is None:
                part.missing.append(name)
            else:
                chosen.append(row)
                part.shards.append(folder + name)
            continue
        if not name and not mixed:
            refuse_mixture(folder_name(catalogue.url), catalogue.names)
        rows = [row for row, each in enumerate(catalogue.names) if _matches(name, each)]
        if not rows:
            part.missing.append(name)
        chosen += rows
        prefix = part.origin.of("")
        part.shards += [prefix + catalogue.names[row] for row in rows]
    part.rows = np.array(chosen, dtype=np.int64)
    if np.any(np.diff(part.rows) < 0):
        order = np.argsort(part.rows, kind="stable")
        part.rows, part.shards = part.rows[order], [part.shards[number] for number in order]
    return part


def _matches(pattern: str, name: str) -> bool:
    """Whether a file matches the last component of a path; "" is the whole folder."""
    return not pattern or _expression(pattern).match(name) is not None


@lru_cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(glob_translate(pattern))


def _check(parts: list[_Part], rank: int, gather: Gather) -> None:
    """Raise DataError, on all ranks, when a catalogue is stale. Each rank checks its share of the shards."""
    shared(lambda: [_check_names(part) for part in parts] if rank == 0 else None, gather)
    ranks = len(gather(None))
    chunks = []
    for number, part in enumerate(parts):
        # Without states each rank opens one shard.
        size = CHUNK if part.origin.kind in (LOCAL, S3) else -(-len(part.rows) // ranks)
        starts = range(0, len(part.rows), max(1, size))
        chunks += [_Chunk(number, start, min(start + size, len(part.rows))) for start in starts]
    found = spread(lambda chunk: _suspects(parts[chunk.part], chunk), chunks, rank, gather)
    suspects = [(chunk.part, number) for chunk, each in zip(chunks, found, strict=True) for number in each.numbers]
    spread(lambda suspect: _compare(parts[suspect[0]], suspect[1]), suspects, rank, gather)
    rewritten = sum(len(each.numbers) for each in found if not each.drawn)
    if rewritten and rank == 0:
        log.warning(
            "%s: %d shards or indexes were written again with equal content, and were opened one by one; `bifrost data"
            " catalogue %s` makes opening fast again",
            parts[0].catalogue.url,
            rewritten,
            folder_name(parts[0].catalogue.url),
        )


def _check_names(part: _Part) -> None:
    """Raise DataError for named shards that the catalogue lacks, and on file systems other than S3, where the listing
    of states shows them, for those that were added or removed."""
    catalogue, folder = part.catalogue, part.catalogue.url.removesuffix(NAME)
    for name in part.missing:
        if is_shard(name):
            open_header(folder + name)  # raises the usual error if there is none
        else:
            expand(folder + name)
        raise catalogue.stale(f"shards were added that {name or 'the folder'} includes")
    if not part.open_ended or part.origin.kind == S3:
        return
    known = set(catalogue.names)
    if part.origin.kind == LOCAL:
        path = part.origin.path
        listed = {name for name in names_in(path or "/") if name.endswith(".tar") and not name.startswith(".")}
        listed = {name for name in listed if name in known or is_kind(f"{path}/{name}", stat.S_ISREG)}
    else:
        listed = {posixpath.basename(shard) for shard in expand(folder)}
    part.require_same(listed, known)


class _Suspects(NamedTuple):
    """Shards that have to be opened."""

    numbers: list[int]
    drawn: bool
    """Whether they are a sample, where there are no states."""


def _suspects(part: _Part, chunk: _Chunk) -> _Suspects:
    """The shards of a chunk whose states are not those in the catalogue."""
    catalogue = part.catalogue
    rows = part.rows[chunk.start : chunk.stop].tolist()
    states = _states(part, rows)
    if states is None:
        return _Suspects([random.randrange(chunk.start, chunk.stop)], True)
    copied = catalogue.origin != part.origin.kind  # sizes are comparable, modifications are not
    numbers = []
    for number, (row, state) in enumerate(zip(rows, states, strict=True), chunk.start):
        expected = (int(catalogue.numbers[0, row]), *catalogue.numbers[len(FIELDS) :, row].tolist())
        if state is None or (state[::2] != expected[::2] if copied else state != expected):
            numbers.append(number)
    return _Suspects(numbers, False)


def _states(part: _Part, rows: list[int]) -> list[State | None] | None:
    """The present states of some shards; None where they cannot be listed. Raises DataError for shards that were added
    or removed, if the listing shows it."""
    known = part.catalogue.names
    names = [known[row] for row in rows]
    if part.origin.kind == LOCAL:
        return local_states(part.origin, names)
    first, last = rows[0], rows[-1]
    if part.origin.kind != S3 or last - first > MOST_LISTED:
        return None
    following = known[last + 1] if last + 1 < len(known) else None
    try:
        found = listed_states(part.origin, names, known[first - 1] if first else None, following)
    except DataLost:
        raise
    except DataError as error:  # objects may be readable without the permission to list them
        log.warning("%s", error)
        return None
    here = set(names)
    part.require_same({name for name in found.shards if name in here or part.row(name) is None}, here)
    return found.states


def _compare(part: _Part, number: int) -> None:
    """Open a shard as without a catalogue; raises DataError when that fails, or its header is not the catalogue's."""
    shard = part.shards[number]
    header = open_header(shard)
    if header != part.catalogue.headers(part.rows[number : number + 1].tolist())[0]:
        raise part.catalogue.stale(f"{posixpath.basename(shard)} or its index was changed")
