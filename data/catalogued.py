"""Opening a data set from the catalogues of its folders, without a request per shard."""

from __future__ import annotations

import logging
import os
import posixpath
import random
import re
import stat
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from fsspec.utils import glob_translate

from .catalogue import FIELDS, Catalogue, Headers, Place, load, load_if_readable
from .catalogue_state import CHUNK, LAST, LOCAL, S3, Origin, State, listed_states, local_states, origin_of
from .errors import DataError, DataLost, DataMissing
from .index import open_header
from .local import is_kind, stat_of, with_retries
from .shard_list import check_sorted, expand, folder_of, has_wildcard, is_shard, patterns, refuse_mixture
from .spread import Gather, shared, spread

log = logging.getLogger(__name__)
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
                raise self.catalogue.place.stale(f"{name} was {'added' if name in listed else 'removed'}")

    @cached_property
    def prefix(self) -> str:
        """The common start of all names."""
        return os.path.commonprefix([re.split(r"[*?\[]", name)[0] for name in self.names])  # noqa: RUF071

    @cached_property
    def listed(self) -> range:
        """Rows of all shards that the names might include; the listing of these shows the ones that were added."""
        names, size = self.catalogue.names, len(self.prefix)
        return range(bisect_left(names, self.prefix), bisect_right(names, self.prefix, key=lambda name: name[:size]))

    def chunks(self, ranks: int) -> list[np.ndarray]:
        """Rows of the shards that are checked together: on S3 by one request, without states one shard per rank."""
        if self.origin.kind not in (LOCAL, S3):
            return np.array_split(self.rows, min(ranks, len(self.rows)))
        rows = np.array(self.listed) if self.origin.kind == S3 and self.open_ended else self.rows
        return np.split(rows, np.flatnonzero(np.diff(rows // CHUNK)) + 1)

    def around(self, rows: np.ndarray) -> tuple[str, str] | tuple[()]:
        """Names between which the listing of these rows has to be complete, so that it shows added shards."""
        if not self.open_ended:
            return ()
        names, (first, last) = self.catalogue.names, (int(rows[0]), int(rows[-1]))
        after = names[first - 1] if first > self.listed.start else self.prefix[:-1]
        return after, names[last + 1] if last + 1 < self.listed.stop else self.prefix + LAST

    def selected(self, rows: np.ndarray) -> list[int]:
        """The rows of selected shards among `rows`."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return rows[self.rows[places] == rows].tolist()


def open_catalogued(
    spec: str | list[str], mixed: bool, rank: int, gather: Gather, index_dir: str | None = None
) -> Catalogued | None:
    """The shards and headers of a data set whose folders have catalogues; None without them. index_dir: folder of their
    indexes and catalogues.

    Each rank reads the catalogues, and checks its share of the shards: on local file systems and S3 sizes and
    modification of shards and indexes, elsewhere one shard; a data set compares the others when it opens them. Raises
    DataError, on all ranks, when a catalogue is damaged or stale.
    """
    named = _by_folder(spec)
    if named is None:
        return None
    places = [Place(folder, index_dir) for folder in named]
    found: list[Catalogue] = []

    def first() -> list[str] | None:
        if rank == 0:
            found.extend(_load_all(places))
        return [each.sha256 for each in found] or None

    hashes = shared(first, gather)[0]
    if hashes is None:
        return None

    shared(lambda: found.extend(map(partial(_load_same, rank), places, hashes)) if rank else None, gather)
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
        if "?" in name and origin_of(folder).kind == "http":  # where it begins a query
            return None
        named.setdefault(folder, []).append(name)
        if len(named) > MOST_FOLDERS:
            return None
    return named or None


def _load_all(places: list[Place]) -> list[Catalogue]:
    """The folders' catalogues; none unless all have one."""
    found: list[Catalogue] = []
    for place in places:
        catalogue = load_if_readable(place)
        if catalogue is None:
            if found:
                log.warning("%s has no catalogue, unlike %s: opening every shard", place.folder, found[0].place.url)
            return []
        found.append(catalogue)
    return found


def _load_same(rank: int, place: Place, sha256: str) -> Catalogue:
    """The folder's catalogue on another rank than 0; DataError if it has another hash than on rank 0."""
    try:
        catalogue = load(place)
    except DataMissing:
        catalogue = None
    if catalogue is None or catalogue.sha256 != sha256:
        raise DataError(
            f"{place.url}: rank {rank} reads another catalogue than rank 0, or none; copy the data set again, or"
            " start again if the catalogue was being written"
        )
    return catalogue


def _select(catalogue: Catalogue, names: list[str], mixed: bool) -> _Part:
    folder = catalogue.place.folder
    part = _Part(catalogue, origin_of(*catalogue.place), names, [], np.empty(0, dtype=np.int64), [])
    singles: list[int] = []
    for name in filter(is_shard, names):
        row = part.row(name)
        if row is None:
            part.missing.append(name)
        else:
            singles.append(row)
            part.shards.append(folder + name)
    chosen = [np.array(singles, dtype=np.int64)]
    for name in names:
        if is_shard(name):
            continue
        if not name and not mixed:
            refuse_mixture(catalogue.place.named, catalogue.names)
        rows = np.fromiter((row for row, each in enumerate(catalogue.names) if _matches(name, each)), dtype=np.int64)
        if not len(rows):
            part.missing.append(name)
        chosen.append(rows)
        prefix = part.origin.of("")
        part.shards += [prefix + catalogue.names[row] for row in rows]
    part.rows = np.concatenate(chosen)
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
    chunks = [(part, rows) for part in parts for rows in part.chunks(ranks)]
    found = spread(lambda chunk: _suspects(*chunk), chunks, rank, gather)
    suspects = [(part, row) for (part, _), each in zip(chunks, found, strict=True) for row in each.rows]
    spread(lambda suspect: _compare(*suspect), suspects, rank, gather)
    rewritten = sum(len(each.rows) for each in found if not each.drawn)
    refusals = [each.refusal for each in found if each.refusal]
    if refusals and rank == 0:
        log.warning("%s; shards are compared with the catalogue when they are first read", refusals[0])
    if rewritten and rank == 0:
        log.warning(
            "%s: %d shards or indexes were written again with equal content, and were opened one by one; %s"
            " makes opening fast again",
            parts[0].catalogue.place.url,
            rewritten,
            parts[0].catalogue.place.renewal,
        )


def _check_names(part: _Part) -> None:
    """Raise DataError for named shards that the catalogue lacks, and on file systems other than S3, where the listing
    of states shows them, for those that were added or removed."""
    folder, index_dir = part.catalogue.place
    for name in part.missing:
        if is_shard(name):
            open_header(folder + name, index_dir)  # raises the usual error if there is none
        else:
            expand(folder + name)
        raise part.catalogue.place.stale(f"shards were added that {name or 'the folder'} includes")
    if not part.open_ended or part.origin.kind == S3:
        return
    known = set(part.catalogue.names)
    if part.origin.kind == LOCAL:
        path = part.origin.path
        added = with_retries(lambda: _others(path or "/", known), path)
        added = {name for name in added if is_kind(f"{path}/{name}", stat.S_ISREG)}
        part.require_same(added, set())  # removed ones are found by their states
    else:
        part.require_same({posixpath.basename(shard) for shard in expand(folder)}, known)


def _others(path: str, known: set[str]) -> list[str]:
    """Names of shards in a local folder other than `known`, without a list of all."""
    with os.scandir(path) as entries:
        names = (entry.name for entry in entries)
        return [name for name in names if name.endswith(".tar") and not name.startswith(".") and name not in known]


class _Suspects(NamedTuple):
    """Shards that have to be opened."""

    rows: list[int]
    drawn: bool = False
    """Whether they are a sample, where there are no states."""
    refusal: str = ""
    """Why the states cannot be listed."""


def _suspects(part: _Part, rows: np.ndarray) -> _Suspects:
    """The selected shards in these rows whose states are not those in the catalogue. Raises DataError for shards that
    were added or removed, if a listing shows it."""
    selected, known = part.selected(rows), part.catalogue.names
    if part.origin.kind == LOCAL:
        states = local_states(part.origin, [known[row] for row in selected])
        lost = [known[row] for row, state in zip(selected, states, strict=True) if state is None]
        part.require_same(set(), {name for name in lost if stat_of(f"{part.origin.path}/{name}") is None})
        return _changed(part, selected, states)
    if part.origin.kind != S3:
        return _Suspects(_one_of(selected), drawn=True)
    names = [known[row] for row in rows]
    try:
        found = listed_states(part.origin, names, *part.around(rows))
    except DataLost:
        raise
    except DataError as error:  # objects may be readable without the permission to list them
        return _Suspects(_one_of(selected), drawn=True, refusal=str(error))
    here = set(names)
    part.require_same({name for name in found.shards if name in here or part.row(name) is None}, here)
    states = dict(zip(rows.tolist(), found.states, strict=True))
    return _changed(part, selected, [states[row] for row in selected])


def _one_of(rows: list[int]) -> list[int]:
    return [random.SystemRandom().choice(rows)] if rows else []  # keeps the state of the caller's random numbers


def _changed(part: _Part, rows: list[int], states: list[State | None]) -> _Suspects:
    catalogue = part.catalogue
    copied = catalogue.origin != part.origin.kind  # sizes are comparable, modifications are not
    found = []
    for row, state in zip(rows, states, strict=True):
        expected = (int(catalogue.numbers[0, row]), *catalogue.numbers[len(FIELDS) :, row].tolist())
        if state is None or (state[::2] != expected[::2] if copied else state != expected):
            found.append(row)
    return _Suspects(found)


def _compare(part: _Part, row: int) -> None:
    """Open a shard as without a catalogue; raises DataError when that fails, or its header is not the catalogue's."""
    catalogue = part.catalogue
    header = open_header(part.origin.folder + catalogue.names[row], part.origin.index_dir)
    if header != catalogue.headers([row])[0]:
        raise catalogue.place.stale(f"{catalogue.names[row]} or its index was changed")
