"""Candidates of an ingest, described by the location of their bytes, and the common form of all sources."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, DataLost, DataMissing
from .files import is_local
from .index import IMAGE_TYPES
from .local import NOTHING, with_retries
from .remote import filesystem
from .remote_file import RemoteFile
from .retry import call

if TYPE_CHECKING:
    from .parquet import RowBytes

WRONG_TYPE = "not a .jpg, .jpeg, .png or .webp; convert it"
"""Reason for rejecting an image of an unsupported format."""


NO_FILE = "no such file"

_remote = lru_cache(maxsize=2)(RemoteFile)
"""Pieces of one tar are read consecutively, so a server without range requests sends each tar once."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: all of it, or `size` bytes from `offset`."""

    url: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes, with retries of storage errors. Raises ValueError when the file ends early. A permanent error is
        raised unchanged for a file of its own; for a tar, which was readable before, it is a DataError."""
        if self.size == 0:  # some servers answer an empty range with the whole file
            return b""
        if self.size is None:
            return with_retries(self._read, self.url)
        try:
            data = call(self._read, self.url)
        except DataMissing as error:
            raise DataLost(f"{self.url}: cannot be read any more; check the storage") from error
        if len(data) != self.size:
            raise ValueError(f"the file ends inside it, at byte {self.offset + len(data)}")
        return data

    def _read(self) -> bytes:
        if self.size is not None and not is_local(self.url):
            return _remote(self.url).read(self.offset, self.size)
        with open(filesystem(self.url)[1], "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class JsonField:
    """A field of a JSON member; missing where the member is None."""

    member: Piece | None
    name: str


@dataclass(frozen=True)
class Candidate:
    """An image that may become a sample."""

    key: str
    members: dict[str, Piece]
    """Extension -> bytes: all members of a tar's sample; of other sources, the image and the source image."""
    caption: Any
    """The caption from the table, or the `Piece` of a text file or member, or of the JSON member that has it."""
    caption_fields: tuple[str, ...] = ()
    """Fields of the JSON member that may hold the caption; empty for plain text."""
    image: RowBytes | None = None
    """The image, when a table embeds it; its type is known once it is read."""
    other_captions: tuple[Any, ...] = ()
    """Captions from further columns of the table, or from further fields of the JSON member, which is a `JsonField`."""
    other_key: str | None = None
    """The key to use when an earlier candidate has `key`; None if that makes this one a duplicate."""
    source_image: RowBytes | None = None
    """Like `image`, of an editing pair."""


@dataclass
class Source:
    candidates: list[Candidate] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Key (or row, or tar) and reason of each rejected item."""
    damaged: list[str] = field(default_factory=list)
    """Tar and damage, for each tar that could be read only in part."""
    state: str = ""
    """Hash over names, sizes and modification times of everything listed; changes when the source does."""


def key_of(relative: str) -> str:
    """Path relative to the source -> key, without extension or dots in the base name, where WebDataset ends a key."""
    folder, name = os.path.split(re.sub(r"^(\.{0,2}/)+", "", relative))
    name = (name.rpartition(".")[0] or name).replace("%", "%25").replace(".", "%2E")
    return f"{folder}/{name}" if folder else name


def note(seen: hashlib._Hash, path: str) -> str | None:
    """Add a file's size and time to `seen`; returns the reason when it cannot be read."""
    try:
        found = with_retries(lambda: os.stat(path), path)
    except OSError as error:
        return why_not(path, error)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return NO_FILE  # the name contains a NUL
    if not stat.S_ISREG(found.st_mode):  # opening a FIFO would block forever
        return "not a regular file"
    seen.update(described(path, found).encode(errors="surrogateescape"))
    return None


def image_file(folder: str | Path, name: str, seen: hashlib._Hash) -> tuple[str, Piece] | str:
    """Extension and bytes of an image file, noted as by `note`; or why it cannot be used."""
    path, kind = os.path.join(folder, name), name.rpartition(".")[2].lower()
    if kind not in IMAGE_TYPES:
        return f"{WRONG_TYPE}: {name}"
    problem = note(seen, path)
    return f"{problem}: {name}" if problem else (kind, Piece(path))


def why_not(path: str, error: OSError) -> str:
    """Why a listed path cannot be read."""
    if error.errno in NOTHING:
        try:
            return f"a link to {with_retries(lambda: os.readlink(path), path)}, which does not exist"
        except OSError:
            pass  # not a link
    return NO_FILE if error.errno == errno.ENOENT else f"{error.strerror}"


def state_of(path: Path) -> str:
    return described(str(path), with_retries(lambda: os.stat(path), path))


def described(path: str, found: os.stat_result) -> str:
    return f"{path} {found.st_size} {found.st_mtime_ns}\n"
