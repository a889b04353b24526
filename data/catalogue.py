"""The catalogue of a folder: names, headers and states of all its shards in one file.

`shards.catalogue`, next to the shards or with their indexes, begins with a line of JSON, `{"version", "shards",
"names", "origin", "sha256"}`: number of shards, bytes of their names, storage on which it was written, hash of all that
follows. Then come, for S shards sorted by name: int64 [10, S] in little-endian order, a row per field of `FIELDS` and
`STATES`; the hashes of the tars, [S, 32] bytes; the names, UTF-8, separated by NUL.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .errors import DataError, DataLost, DataMissing
from .files import content, write
from .index import VERSION as INDEX_VERSION
from .index import Header, damaged
from .index_dir import option, place_of

log = logging.getLogger(__name__)
NAME = "shards.catalogue"
VERSION = 1
FIELDS = ("bytes", "samples", "captions", "shortest", "longest", "characters", "image_bytes")
"""Of a shard's `Header`; shortest, longest and characters are its `caption_chars`."""
STATES = ("modified", "index_bytes", "index_modified")
"""Of the shard and its index. modified: nanoseconds on a local file system, a hash of the ETag on S3, elsewhere 0."""


class Place(NamedTuple):
    """A folder of shards, and where their indexes are stored; the catalogue is stored with these."""

    folder: str
    """Path or URL, with the final slash; empty for the working directory."""
    index_dir: str | None = None
    """None: next to the shards."""

    @property
    def url(self) -> str:
        """Path or URL of the catalogue."""
        return place_of(self.folder + NAME, self.index_dir)

    @property
    def named(self) -> str:
        """The folder, as a command names it."""
        return self.folder.rstrip("/") or "."

    @property
    def renewal(self) -> str:
        """The command that renews the catalogue, for messages."""
        return f"`bifrost data catalogue {self.named}{option(self.index_dir)}`"

    def stale(self, what: str) -> DataError:
        """The error for a catalogue that does not describe the shards."""
        return DataError(f"{self.url}: stale: {what}; run {self.renewal}")


@dataclass(frozen=True)
class Catalogue:
    place: Place
    names: list[str]
    """File names of the shards, sorted."""
    numbers: np.ndarray
    """int64 [10, S]: `FIELDS`, then `STATES`."""
    hashes: np.ndarray
    """SHA-256 of the tars, uint8 [S, 32]."""
    origin: str
    """Protocol of the file system on which the states were determined."""
    sha256: str
    """Hash of the content."""

    @property
    def samples(self) -> int:
        return int(self.numbers[FIELDS.index("samples")].sum())

    def headers(self, rows: Sequence[int]) -> Headers:
        """Headers of the shards in these rows."""
        return Headers([self], np.zeros(len(rows), dtype=np.int16), np.array(rows, dtype=np.int64))


class Headers:
    """Headers of shards, made on access from about 100 bytes per shard."""

    def __init__(self, catalogues: Sequence[Catalogue], owners: np.ndarray, rows: np.ndarray) -> None:
        """owners, rows: catalogue and row in it of each shard, int [S]."""
        self._places = [each.place for each in catalogues]
        self._owners = owners.astype(np.int16)
        if len(catalogues) == 1 and len(rows) and np.all(np.diff(rows) == 1):  # a view needs no further memory
            chosen = slice(int(rows[0]), int(rows[-1]) + 1)
            self._numbers, self._hashes = catalogues[0].numbers[: len(FIELDS), chosen], catalogues[0].hashes[chosen]
            return
        self._numbers = np.empty((len(FIELDS), len(rows)), dtype=np.int64)
        self._hashes = np.empty((len(rows), 32), dtype=np.uint8)
        for number, each in enumerate(catalogues):
            here = owners == number
            self._numbers[:, here] = each.numbers[: len(FIELDS), rows[here]]
            self._hashes[here] = each.hashes[rows[here]]

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, shard: int) -> Header:
        size, samples, captions, *characters, image_bytes = self._numbers[:, shard].tolist()
        shortest, longest, total = characters
        sha256 = self._hashes[shard].tobytes().hex()
        return Header(INDEX_VERSION, size, sha256, samples, captions, (shortest, longest, total), image_bytes)

    def __iter__(self) -> Iterator[Header]:
        return map(self.__getitem__, range(len(self)))

    @property
    def samples(self) -> np.ndarray:
        """Samples per shard, int64 [S]."""
        return self._numbers[FIELDS.index("samples")]

    def hexadecimal(self) -> Iterator[str]:
        """The tars' hashes in hex, one after the other, in parts."""
        return (self._hashes[start : start + 4096].tobytes().hex() for start in range(0, len(self), 4096))

    def stale(self, shard: int, index: str) -> DataError:
        """The error for a shard whose index is not the one in the catalogue."""
        return self._places[self._owners[shard]].stale(f"{index} was changed")


def from_headers(place: Place, names: list[str], headers: list[Header], states: np.ndarray, origin: str) -> Catalogue:
    """A catalogue of shards sorted by name. states: int64 [3, S]. Raises DataError for a header with values that no
    index has."""
    columns, hashes = [], []
    for name, header in zip(names, headers, strict=True):
        values = (header.bytes, header.samples, header.captions, *header.caption_chars, header.image_bytes)
        try:
            columns.append(np.array(values, dtype=np.int64))
            hashes.append(np.frombuffer(bytes.fromhex(header.sha256), dtype=np.uint8).reshape(32))
        except (ValueError, TypeError, OverflowError):
            raise damaged(place.folder + name, place.index_dir) from None
    numbers = np.concatenate([np.stack(columns, axis=1), states])
    catalogue = Catalogue(place, names, numbers, np.stack(hashes), origin, "")
    for name, header, kept in zip(names, headers, catalogue.headers(range(len(names))), strict=True):
        if header != kept:  # such as a hash in upper case
            raise damaged(place.folder + name, place.index_dir)
    return catalogue


def save(catalogue: Catalogue) -> None:
    """Write a catalogue atomically. Raises DataError or DataLost when it cannot be written."""
    names = "\0".join(catalogue.names).encode(errors="surrogateescape")
    body = catalogue.numbers.astype("<i8").tobytes() + catalogue.hashes.tobytes() + names
    sha256 = hashlib.sha256(body).hexdigest()
    head = {"version": VERSION, "shards": len(catalogue.names), "names": len(names), "origin": catalogue.origin}
    data = json.dumps({**head, "sha256": sha256}).encode() + b"\n" + body
    write(catalogue.place.url, data)


def load(place: Place) -> Catalogue:
    """Read a catalogue with one request, and compare it with its hash. Raises DataMissing without one, DataLost when
    the storage is unavailable, DataError when it is damaged or of another version."""
    return _parse(place, memoryview(content(place.url)))


def load_if_readable(place: Place) -> Catalogue | None:
    """`load`, or None for one that is missing or cannot be read: S3 refuses a missing object without permission to list
    the bucket, and some servers send a page."""
    try:
        data = content(place.url)
    except DataLost:
        raise
    except DataError as error:
        if not isinstance(error, DataMissing):
            log.info("%s; opening without it", error)
        return None
    return _parse(place, memoryview(data))


def _parse(place: Place, data: memoryview) -> Catalogue:
    try:
        end = bytes(data[:4096]).index(b"\n")
        head = json.loads(bytes(data[:end]))
        version, shards, text, origin = (head[key] for key in ("version", "shards", "names", "origin"))
        if version == VERSION:
            body, fields = data[end + 1 :], len(FIELDS) + len(STATES)
            places = (0, 8 * fields * shards, (8 * fields + 32) * shards, (8 * fields + 32) * shards + text)
            if len(body) != places[-1] or hashlib.sha256(body).hexdigest() != head["sha256"]:
                raise ValueError
            numbers, hashes, names = (body[start:stop] for start, stop in pairwise(places))
            return Catalogue(
                place,
                bytes(names).decode(errors="surrogateescape").split("\0"),
                np.frombuffer(numbers, dtype="<i8").reshape(fields, shards),
                np.frombuffer(hashes, dtype=np.uint8).reshape(shards, 32),
                origin,
                head["sha256"],
            )
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{place.url}: damaged catalogue; run {place.renewal}") from None
    raise DataError(f"{place.url}: catalogue version {version}, expected {VERSION}; run {place.renewal}")
