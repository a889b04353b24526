"""A remote object that is read in ranges, and must stay the same object."""

from __future__ import annotations

import logging
import threading

from .errors import DataError
from .kept import Kept
from .remote import Fetch, Response, check_size, fetch, size_of

log = logging.getLogger(__name__)


class RemoteFile:
    """Range reads of one object.

    total: its size in bytes from the index; None accepts the server's size. get: makes the requests.
    """

    def __init__(self, url: str, total: int | None = None, get: Fetch = fetch) -> None:
        self.url = url
        self.total = total
        self._get = get
        self._tag: str | None = None
        self._whole: Kept | None = None
        self._lock = threading.Lock()

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes from offset `start`, fewer only at the end of the object. Raises like `fetch`, and
        DataError when the object was replaced since the first read."""
        with self._lock:
            whole = self._whole
        if whole is None:
            response = self._get(self.url, start, size)
            with self._lock:
                if response.whole and response.total is None:  # its end was the end of the connection
                    check_size(response.whole.size, self.total or size_of(self.url))
                self._same(response)
                if response.whole is None:
                    if self.total is not None:
                        check_size(len(response.body), max(0, min(start + size, self.total) - start))
                    return response.body
                if self._whole is None:
                    log.warning("%s: the server ignores byte ranges; reading and keeping the whole object", self.url)
                    self._whole = response.whole
                elif self._whole is not response.whole:  # another thread was first
                    response.whole.close()
                whole = self._whole
        return whole.read(start, size)

    def close(self) -> None:
        with self._lock:
            if self._whole is not None:
                self._whole.close()
                self._whole = None

    def _same(self, response: Response) -> None:
        if response.total is not None:
            if self.total not in (None, response.total):
                raise DataError(
                    f"{self.url}: {response.total} bytes, expected {self.total}: it was replaced or truncated;"
                    " restore it, or index it again"
                )
            self.total = response.total
        if response.tag is not None:
            if self._tag not in (None, response.tag):
                raise DataError(
                    f"{self.url}: it was replaced while being read (ETag {self._tag}, now {response.tag}); restore it,"
                    " or index it again"
                )
            self._tag = response.tag
