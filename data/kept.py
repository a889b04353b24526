"""Temporary copies of whole objects, for servers that ignore byte ranges."""

from __future__ import annotations

import os
import tempfile
import threading

from .errors import DataError

WHOLE_LIMIT = 4 << 30
"""Total bytes of whole objects, from servers that ignore byte ranges, that a process keeps in its temporary folder."""


class Kept:
    """A whole object in an unnamed temporary file; a process keeps at most WHOLE_LIMIT bytes of them in total."""

    _lock = threading.Lock()
    _total = 0

    def __init__(self, url: str, body: bytes = b"") -> None:
        self.url = url
        self.size = 0
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed by `close`
        if body:
            self.write(body)

    def write(self, chunk: bytes) -> None:
        with Kept._lock:
            Kept._total += len(chunk)
            self.size += len(chunk)
            full = Kept._total > WHOLE_LIMIT
        if full:
            self.close()
            raise DataError(
                f"{self.url}: the server ignores byte ranges, and whole shards of more than"
                f" {WHOLE_LIMIT / 2**30:.3g} GiB are not kept; serve them from a server with byte ranges or from"
                " S3, or copy them"
            )
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        with Kept._lock:
            Kept._total -= self.size
            self.size = 0
        self._file.close()
