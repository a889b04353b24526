"""Write and verify the catalogues of folders of shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .catalogue import STATES, Catalogue, Place, from_headers, load_if_readable, save
from .catalogue_state import CHUNK, LOCAL, S3, State, listed_states, local_states, origin_of
from .errors import DataError, DataLost
from .files import require_writable
from .index import Header, open_header
from .progress import progress
from .shard_list import expand, folder_of
from .spread import THREADS


def make_catalogues(spec: str | list[str], index_dir: str | None = None) -> list[Catalogue]:
    """Write the catalogue of each folder of the named shards, of all shards in it. index_dir: folder of their indexes,
    in which the catalogues are written, too. Raises DataError when a shard has no
    index or another size than in it, or the folder cannot be listed or written; the old catalogue then remains."""
    folders = list(dict.fromkeys(map(folder_of, expand(spec))))
    places = [Place(folder, index_dir) for folder in folders]
    for place in places:
        require_writable(place.url, "a catalogue")
    return [_make(place) for place in places]


def _make(place: Place) -> Catalogue:
    folder, index_dir = place
    origin = origin_of(folder, index_dir)
    shards = expand(folder or ".")
    names = sorted(shard.rpartition("/")[2] for shard in shards)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(names), CHUNK)]

    def states(chunk: slice) -> list[State | None]:
        if origin.kind == LOCAL:
            return local_states(origin, names[chunk])
        if origin.kind != S3:
            return [(0, 0, 0, 0)] * len(names[chunk])
        return listed_states(origin, names[chunk]).states

    def header(name: str) -> Header:
        found = open_header(folder + name, index_dir)
        shown.advance()
        return found

    with ThreadPoolExecutor(THREADS) as pool, progress("reading indexes", len(names), "shards") as shown:
        # Before the headers, so that a file that is written in between has another state than the catalogue's.
        before = [state or (0, 0, 0, 0) for part in pool.map(states, chunks) for state in part]
        headers = list(pool.map(header, names))
    numbers = np.array(before, dtype=np.int64)[:, 1:].T
    assert len(numbers) == len(STATES)
    catalogue = from_headers(place, names, headers, numbers, origin.kind)
    save(catalogue)
    return catalogue


def catalogue_problems(headers: dict[str, Header], index_dir: str | None) -> list[str]:
    """One line per catalogue of the shards' folders that is damaged or does not have these headers. index_dir: folder
    of their indexes."""
    problems = []
    for folder in dict.fromkeys(map(folder_of, headers)):
        try:
            catalogue = load_if_readable(Place(folder, index_dir))
        except DataLost:
            raise
        except DataError as error:
            problems.append(str(error))
            continue
        if catalogue is None:
            continue
        known = dict(zip(catalogue.names, catalogue.headers(range(len(catalogue.names))), strict=True))
        here = {shard.rpartition("/")[2]: header for shard, header in headers.items() if folder_of(shard) == folder}
        changed = [name for name, header in here.items() if known.get(name) != header]
        removed = sorted(known.keys() - _names(folder, list(known)))
        for names, what in ((changed, "or their indexes were changed or added"), (removed, "were removed")):
            if names:
                more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
                problems.append(str(catalogue.place.stale(f"{names[0]}{more} {what}")))
    return problems


def _names(folder: str, known: list[str]) -> set[str]:
    """The names of a folder's shards; `known` if they cannot be listed, as over HTTP."""
    try:
        return {shard.rpartition("/")[2] for shard in expand(folder or ".")}
    except DataLost:
        raise
    except DataError:
        return set(known)
