"""Requests in the background: a bounded number at once, in the order in which they are queued."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future

from .remote import CONNECTIONS, Response, request


class Range:
    """A request for bytes of one object."""

    def __init__(self, url: str, start: int, size: int) -> None:
        self.url, self.start, self.size = url, start, size
        self.response: Future[Response] | None = None
        """None until the request is sent."""

    @property
    def end(self) -> int:
        return self.start + self.size

    def arrived(self) -> bool:
        return self.response is not None and self.response.done() and not self.failed()

    def failed(self) -> bool:
        sent = self.response
        return sent is not None and sent.done() and (sent.cancelled() or sent.exception() is not None)


class Connections:
    """Sends requests, at most `limit` at once.

    A failed request lowers the limit by one, as many successful ones as there are connections raise it by one. A server
    that refuses more than some number of connections thus gets no more, and one that is down gets no requests until a
    read that was not made here succeeds (`recovered`).

    Of each object one range is requested alone, until its response shows that the server supports ranges; a server that
    ignores them sends the whole object, and this response is then that of all ranges of the object.
    """

    def __init__(self) -> None:
        self.limit = CONNECTIONS
        self._running = 0
        self._succeeded = 0
        self._queue: list[Range] = []
        self._probes: dict[str, Range] = {}
        """First request of each object, while it is under way."""
        self._supported: set[str] = set()
        """Objects of which ranges were received."""
        self._whole: dict[str, Future[Response]] = {}
        self._changed = threading.Condition(threading.RLock())  # cancelling runs `_ended` in the same thread

    def add(self, ranges: Iterable[Range]) -> None:
        """Queue requests."""
        with self._changed:
            self._queue += ranges
            self._send_queued()

    def send_now(self, wanted: Range) -> bool:
        """Send a queued request before all others, above the limit if necessary. False if requests are failing: it is
        then removed from the queue."""
        with self._changed:
            while wanted.response is None:
                if not self.limit:
                    self._queue.remove(wanted)
                    return False
                if wanted.url in self._probes:
                    self._changed.wait()
                else:
                    self._send(wanted)
        return True

    def recovered(self) -> None:
        """Another request was successful."""
        with self._changed:
            if not self.limit:
                self.limit = 1
                self._send_queued()

    def cancel(self, ranges: Iterable[Range]) -> None:
        """Cancel requests that are queued or under way."""
        dropped = set(ranges)
        with self._changed:
            self._queue = [each for each in self._queue if each not in dropped]
            for each in dropped:
                if each.response is not None:
                    each.response.cancel()

    def forget(self, url: str) -> None:
        """No more ranges of this object are needed for now."""
        with self._changed:
            self._supported.discard(url)
            self._whole.pop(url, None)

    def _send_queued(self) -> None:
        for each in list(self._queue):
            if self._running >= self.limit:
                break
            if each.response is None and each.url not in self._probes:
                self._send(each)

    def _send(self, wanted: Range) -> None:
        self._queue.remove(wanted)
        if wanted.url in self._whole:
            wanted.response = self._whole[wanted.url]
            return
        if wanted.url not in self._supported:
            self._probes[wanted.url] = wanted
        self._running += 1
        try:
            wanted.response = request(wanted.url, wanted.start, wanted.size)
        except Exception as error:  # for the reader
            wanted.response = Future()
            wanted.response.set_exception(error)
        wanted.response.add_done_callback(lambda response: self._ended(wanted, response))

    def _ended(self, sent: Range, response: Future[Response]) -> None:
        with self._changed:
            self._running -= 1
            if self._probes.get(sent.url) is sent:
                del self._probes[sent.url]
            if response.cancelled():
                pass
            elif response.exception() is not None:
                self.limit = max(0, self.limit - 1)
            else:
                self._succeeded += 1
                if self._succeeded % CONNECTIONS == 0:
                    self.limit = min(CONNECTIONS, self.limit + 1)
                if response.result().whole is None:
                    self._supported.add(sent.url)
                else:
                    self._whole[sent.url] = response
            self._send_queued()
            self._changed.notify_all()
