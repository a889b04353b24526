"""Read the members of a tar, with every kind of damage reported.

Python's tarfile takes a damaged header in the middle for the end of the archive and never reads past the end mark;
both lose samples silently. Here each is a tarfile.ReadError with the byte offset.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .errors import DataError

BLOCK = 512  # bytes of a header, and the unit of padding
END_MARK = 2 * BLOCK
RECORD = 20 * BLOCK
"""Default padding unit of an archive in bytes. More zeros are either an incomplete download, or padding by
`tar --concatenate` (up to two records) or with another blocking factor; the file itself does not show which."""
NEVER_END_IN_ZERO = (".json", ".png", ".txt")
CHUNK = 1 << 20
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}
"""First bytes of files that are often named .tar."""
Keep = Callable[[bytes], Any]
"""Content of a member -> what of it is kept in memory."""


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    offset: int
    """Offset of its content in bytes from the start of the tar; a link has the content of its target."""
    size: int
    content: Any
    """What was kept of the content: see `scan`."""
    problem: str | None
    """Why its content cannot be read in place."""


class ManyZeros(tarfile.ReadError):
    """More zeros at the end than padding, after a complete last member."""


class TarInput:
    """A file read sequentially that tracks the end of its content. digest: updated with everything read."""

    def __init__(self, raw: Any, digest: Any = None) -> None:
        self.raw, self.digest = raw, digest
        self.position, self.head = 0, b""
        self.content_end = 0
        """Offset just after the last non-zero byte read."""

    def read(self, size: int) -> bytes:
        data = self.raw.read(size)
        if self.position == 0:
            self.head += data[: 8 - len(self.head)]
        if self.digest is not None:
            self.digest.update(data)
        if content := len(data.rstrip(b"\0")):
            self.content_end = max(self.content_end, self.position + content)
        self.position += len(data)
        return data

    def seek(self, position: int) -> int:
        self.position = self.raw.seek(position)
        return self.position

    def tell(self) -> int:
        return self.position


class _Info(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        at = tarfile.fileobj.tell()
        try:
            info = super().fromtarfile(tarfile)
        except _EndMark:
            tarfile.end_mark = at
            raise
        except _Empty:
            raise _damage(at, "no end-of-archive mark") from None
        except _Header as error:
            raise _damage(at, f"no valid header ({error})") from None
        if info.size < 0:  # tarfile would seek back and loop forever
            raise _damage(at, "a negative size")
        return info


class _Tar(tarfile.TarFile):
    tarinfo = _Info
    end_mark: int | None = None
    """Offset of the block of zeros at which tarfile stopped."""


_Header: Any = tarfile.HeaderError
_EndMark: Any = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_Empty: Any = tarfile.EmptyHeaderError  # pyright: ignore[reportAttributeAccessIssue]


def _damage(at: int, what: str) -> tarfile.ReadError:
    return tarfile.ReadError(f"byte {at}: {what}")


def scan(file: TarInput, read_all: bool, keep: Callable[[str], Keep | None] = lambda name: None) -> Iterator[Member]:
    """Yield the files of a tar in order; links to earlier members count as files.

    read_all: read every byte in order instead of seeking from header to header. keep: by name, what is kept of a
    member's content, nothing for None; needs `read_all`. After the last member before any damage, raises
    tarfile.ReadError with the byte offset: for an invalid header, a missing end mark, data after it, or more zeros than
    padding.
    """
    places: dict[str, tuple[int, int, Any]] = {}
    at, last = 0, None
    try:
        # tarfile never seeks in a stream.
        tar: _Tar = _Tar.open(fileobj=file, mode="r|" if read_all else "r:", bufsize=CHUNK)  # pyright: ignore
        for info in tar:
            at = info.offset_data
            if info.isdir():
                continue
            problem, place = None, None
            if info.issparse():
                problem = "it is stored as a sparse file; write the tar without --sparse"
            elif info.isreg():
                kept = keep(info.name)
                stream = tar.extractfile(info) if kept else None
                content = kept(stream.read()) if kept and stream else None
                place = places[posixpath.normpath(info.name)] = info.offset_data, info.size, content
            elif info.islnk() or info.issym():
                folder = posixpath.dirname(info.name) if info.issym() else ""
                place = places.get(posixpath.normpath(posixpath.join(folder, info.linkname)))
                problem = None if place else f"it is a link to {info.linkname}, which is not an earlier file in the tar"
            else:
                problem = "it is neither a file nor a link"
            last = Member(info.name, *(place or (0, 0, None)), problem)
            yield last
    except tarfile.ReadError as error:
        name = next((name for mark, name in COMPRESSED.items() if file.head.startswith(mark)), None)
        if name and at == 0:
            raise tarfile.ReadError(f"not a plain tar but {name}: samples are read in place, so unpack it") from None
        if str(error).startswith("byte "):
            raise
        raise _damage(at, str(error)) from None
    except DataError:  # from the storage
        raise
    except (EOFError, ValueError, OverflowError, tarfile.TarError) as error:  # values that no valid tar has
        raise _damage(at, str(error)) from None
    assert tar.end_mark is not None, "a tar without one fails at its last header"
    _check_end(file, tar.end_mark, last, read_all)


def _check_end(file: TarInput, mark: int, last: Member | None, read_all: bool) -> None:
    end = last.offset + last.size if last and last.size else 0
    if not read_all:
        file.seek(max(0, end - 1))
        file.read(1)
        file.seek(mark)
    while file.read(CHUNK):
        pass
    size = file.position
    if file.content_end > mark:
        raise _damage(
            mark,
            f"end-of-archive mark, but more content up to byte {file.content_end}: overwritten, or tars that were"
            " joined without `tar --concatenate`",
        )
    if size - mark < END_MARK:
        raise _damage(mark, "no end-of-archive mark")
    if last and file.content_end < end and last.name.lower().endswith(NEVER_END_IN_ZERO):
        raise _damage(file.content_end, f"zeros to the end of the file, also in {last.name}: an incomplete download")
    if size - mark >= END_MARK + RECORD:
        what = f"{size - mark} zeros to the end of the file, more than the padding of a tar: an incomplete download?"
        raise (ManyZeros if file.content_end >= end else tarfile.ReadError)(f"byte {mark}: {what}")
