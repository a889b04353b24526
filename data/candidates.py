"""What every source of an ingest is turned into: candidates, described by where their bytes are, and what is none."""

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
from .local import NOTHING, asked
from .remote import RemoteFile, filesystem
from .retry import call

if TYPE_CHECKING:
    from .parquet import RowBytes

WRONG_TYPE = "not a .jpg, .jpeg, .png or .webp; convert it"
"""Reason of what is an image, though none that is read."""


NO_FILE = "no such file"

_remote = lru_cache(maxsize=2)(RemoteFile)
"""Pieces of one tar come one after another; a server without ranges sends each tar once."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file: all of it, or `size` from `offset` on."""

    url: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; storage that fails is asked again. ValueError where the file ends before them. Of a file of its
        own an error that lasts comes as it is; that a tar, which was read before, gives no more is a DataError."""
        if self.size == 0:  # some servers answer an empty range with the whole file
            return b""
        if self.size is None:
            return asked(self._read, self.url)
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
class Candidate:
    """An image that may become a sample."""

    key: str
    members: dict[str, Piece]
    """From tars the image and whatever else the sample holds, by extension; from elsewhere the image."""
    caption: Any
    """The caption as its table has it, or the `Piece` of a text member or file, or of the JSON member whose field it
    is."""
    caption_fields: tuple[str, ...] = ()
    """Fields of the JSON member that may hold it; none for plain text."""
    image: RowBytes | None = None
    """The image, where a table holds it; its type shows when it is read."""
    other_key: str | None = None
    """The key to use where an earlier candidate has `key`; None where such a candidate is a duplicate."""


@dataclass
class Source:
    candidates: list[Candidate] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Key (or row, or tar) and reason of what is no candidate."""
    damaged: list[str] = field(default_factory=list)
    """Tar and damage, for each tar of which only a part could be read."""
    state: str = ""
    """Hash over names, sizes and times of everything listed: changes when the source does."""


def key_of(relative: str) -> str:
    """Path below the source -> key: no extension, and no dot in the base name, where WebDataset would end the key."""
    folder, name = os.path.split(re.sub(r"^(\.{0,2}/)+", "", relative))
    name = (name.rpartition(".")[0] or name).replace("%", "%25").replace(".", "%2E")
    return f"{folder}/{name}" if folder else name


def note(seen: hashlib._Hash, path: str) -> str | None:
    """Enters a file's size and time; why it cannot be read, if it cannot."""
    try:
        found = asked(lambda: os.stat(path), path)
    except OSError as error:
        return why_not(path, error)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return NO_FILE  # a name with a NUL
    if not stat.S_ISREG(found.st_mode):  # opening a FIFO would wait for ever
        return "not a regular file"
    seen.update(described(path, found).encode(errors="surrogateescape"))
    return None


def why_not(path: str, error: OSError) -> str:
    """Why there is nothing to read at a path that was listed."""
    if error.errno in NOTHING:
        try:
            return f"a link to {asked(lambda: os.readlink(path), path)}, which is not there"
        except OSError:
            pass  # it is no link
    return NO_FILE if error.errno == errno.ENOENT else f"{error.strerror}"


def state_of(path: Path) -> str:
    return described(str(path), asked(lambda: os.stat(path), path))


def described(path: str, found: os.stat_result) -> str:
    return f"{path} {found.st_size} {found.st_mtime_ns}\n"
