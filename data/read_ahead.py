"""Requests for samples of remote shards, sent before the samples are needed.

The plan gives the samples of the coming micro-batches. Their requests are sent together, so that many wait for the
network at once, and samples that are close together in a shard are requested together. Nothing else changes: a response
is passed to the reader as that of its first attempt, an error included, and all checks and retries are the reader's.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, wait
from typing import NamedTuple

from .connections import Connections, Range
from .errors import DataError
from .remote import LONGEST, Response, fetch, has_requests
from .shards import Dataset

AHEAD_BYTES = 128 << 20
"""Bytes of samples that a process requests ahead, including those received and not yet used."""
FIRST_BYTES = 4 << 20
"""The same before the first micro-batch, which therefore arrives soon."""
AHEAD_SAMPLES = 8192
"""Number of samples that a process requests ahead."""
GAP = 64 << 10
"""Gap in bytes between two samples up to which they are requested together: reading it costs about as much processor
time as another request. All gaps are at most as long as the samples together, so that memory and traffic are at most
twice those of the samples."""
LONGEST_RANGE = 4 << 20
"""Bytes up to which samples are requested together."""


class _Sample(NamedTuple):
    number: int
    """Micro-batch."""
    row: int
    """Position within the micro-batch."""
    shard: int
    sample: int
    """Number within the shard."""
    epoch: int
    index: int
    """Number within the dataset. With the epoch it decides which caption is read."""


class _Span(NamedTuple):
    """A range that the reader will read."""

    url: str
    start: int
    size: int


class _Planned(NamedTuple):
    span: _Span
    sample: _Sample


class _Merged(Range):
    """A request for one span or several that are close together."""

    def __init__(self, first: _Planned) -> None:
        super().__init__(*first.span)
        self.first = first.sample
        """The one that is read first."""
        self.unused = 0
        """Spans that were not read yet; the response is kept as long."""
        self._gaps = 0

    def takes(self, span: _Span) -> bool:
        """Whether to request a span, which starts after all others, together with them."""
        gap = max(0, span.start - self.end)
        size = max(self.end, span.start + span.size) - self.start
        return gap <= GAP and size <= LONGEST_RANGE and 2 * (self._gaps + gap) <= size

    def add(self, planned: _Planned) -> None:
        span = planned.span
        self._gaps += max(0, span.start - self.end)
        self.size = max(self.end, span.start + span.size) - self.start
        self.first = min(self.first, planned.sample)
        self.unused += 1


class ReadAhead:
    """The requests of one thread for the samples of its micro-batches.

    samples: micro-batch -> shard, number within the shard, epoch and index of each of its samples. numbers: the
    thread's micro-batches in the order in which it reads them. Until `close`, the dataset takes responses from here.

    More is requested once three quarters are used: the more samples are requested at a time, the more are close
    together.
    """

    def __init__(
        self, dataset: Dataset, samples: Callable[[int], Iterable[tuple[int, int, int, int]]], numbers: Iterable[int]
    ) -> None:
        self.pid = os.getpid()
        self._thread = threading.get_ident()
        self._dataset = dataset
        self._coming = (_Sample(number, row, *place) for number in numbers for row, place in enumerate(samples(number)))
        self._next = next(self._coming, None)
        self._held: list[_Sample] = []
        """Samples without requests, before `_next`: their index is missing or their request failed."""
        self._spans: dict[int, dict[_Span, tuple[_Merged, _Sample]]] = defaultdict(dict)
        """Requested spans of each micro-batch that were not read yet."""
        self._indexes: dict[str, Range] = {}
        """Requested indexes that were not read yet, by URL."""
        self._shards: Counter[int] = Counter()
        """Held samples and requested spans of each shard."""
        self._remote: dict[int, bool] = {}
        """Whether a shard is read ahead; local ones and ones with a damaged index are not."""
        self._number = -1
        self._bytes = 0
        self._most = FIRST_BYTES
        """Bytes to request ahead."""
        self._requested = 0
        """Spans in `_spans`."""
        self._connections = Connections()
        dataset.opened.take_from(self.fetch)

    def close(self) -> None:
        """Cancel all requests."""
        self._dataset.opened.take_from(None)
        merged = [each for spans in self._spans.values() for each, _ in spans.values()]
        self._connections.cancel([*merged, *self._indexes.values()])
        self._spans.clear()
        self._indexes.clear()

    def advance(self, number: int) -> None:
        """Request what is coming; the thread reads micro-batch `number` next."""
        if self._number >= 0:
            self._most = AHEAD_BYTES
        self._number = number
        for past in [each for each in self._spans if each < number]:
            for merged, sample in self._spans.pop(past).values():
                self._release(merged, sample.shard)
                if not merged.unused:
                    self._connections.cancel([merged])
        self._fill()
        needed = {self._dataset.index_path(each.shard) for each in self._held if each.number == number}
        indexes = [self._indexes[url] for url in needed if url in self._indexes]
        if indexes:
            wait([each.response for each in indexes if self._connections.send_now(each) and each.response])
            self._fill()

    def fetch(self, url: str, start: int, size: int) -> Response:
        """`remote.fetch`, or its response from a request that was sent ahead."""
        own = self._thread == threading.get_ident()
        found = self._take(_Span(url, start, size)) if own else None
        if found is None or found.response is None:
            return self._fetch_now(url, start, size)
        try:
            response = found.response.result()
        except CancelledError:
            return self._fetch_now(url, start, size)
        except Exception:
            self._hold_failed()
            raise
        if response.whole is not None or found.size == size:
            return response
        offset = start - found.start
        return Response(response.body[offset : offset + size], response.total, response.tag)

    def _fetch_now(self, url: str, start: int, size: int) -> Response:
        response = fetch(url, start, size)
        self._connections.recovered()
        return response

    def _take(self, span: _Span) -> Range | None:
        """The sent request that contains a span of the current micro-batch or an index; None without one."""
        found: Range
        spans = self._spans.get(self._number, {})
        if span in spans:
            found, sample = spans.pop(span)
            self._release(found, sample.shard)
            if not self._held and self._is_low():
                self._fill()
        elif span.url in self._indexes:
            found = self._indexes.pop(span.url)
            self._connections.forget(span.url)
        else:
            return None
        if self._connections.send_now(found):
            return found
        self._hold_failed(found)
        return None

    def _release(self, merged: _Merged, shard: int) -> None:
        """Count a span as read, or as not needed any more."""
        merged.unused -= 1
        self._requested -= 1
        if not merged.unused:
            self._bytes -= merged.size
        self._forget(shard)

    def _forget(self, shard: int) -> None:
        self._shards[shard] -= 1
        if not self._shards[shard]:
            del self._shards[shard]
            self._connections.forget(self._dataset.shards[shard])

    def _hold_failed(self, unsent: Range | None = None) -> None:
        """Hold the samples of failed requests and of `unsent`, so that they are requested again."""
        for spans in self._spans.values():
            for span, (merged, sample) in list(spans.items()):
                if merged is unsent or merged.failed():
                    del spans[span]
                    self._held.append(sample)
                    self._shards[sample.shard] += 1
                    self._release(merged, sample.shard)
        self._held.sort()

    def _fill(self) -> None:
        """Request held samples where that is possible now, and further ones if few are left."""
        planned: dict[str, list[_Planned]] = defaultdict(list)
        held, self._held = self._held, []
        is_low = self._is_low()
        room, left = self._most - self._bytes, AHEAD_SAMPLES - self._requested - len(held)
        for sample in held:
            if sample.number < self._number:
                self._forget(sample.shard)
            else:
                room -= self._plan(sample, planned)
        if is_low:
            while room > 0 and left > 0 and self._next is not None and self._may_open(self._next.shard):
                if self._next.number >= self._number and self._is_remote(self._next.shard):
                    self._shards[self._next.shard] += 1
                    room -= self._plan(self._next, planned)
                    left -= 1
                self._next = next(self._coming, None)
        self._request(planned)

    def _is_low(self) -> bool:
        return self._bytes <= self._most // 4 and self._requested <= AHEAD_SAMPLES // 4

    def _may_open(self, shard: int) -> bool:
        """Whether all shards that are in use stay open if this one is opened."""
        return shard in self._shards or len(self._shards) < self._dataset.opened.max_open

    def _is_remote(self, shard: int) -> bool:
        if shard not in self._remote:
            self._remote[shard] = has_requests(self._dataset.shards[shard])
        return self._remote[shard]

    def _plan(self, sample: _Sample, planned: dict[str, list[_Planned]]) -> int:
        """Add a sample's spans to `planned`, or hold it until the index is there; returns its bytes."""
        shard = sample.shard
        if not self._remote[shard]:
            self._forget(shard)
            return 0
        try:
            if not self._open(shard):
                self._held.append(sample)
                header = self._dataset.headers[shard]
                return header.bytes // header.samples
            spans = self._dataset.spans(shard, sample.sample, sample.epoch, sample.index)
        except DataError:  # the reader raises it when it gets there
            self._remote[shard] = False
            self._forget(shard)
            return 0
        self._shards[shard] += len(spans) - 1
        url = self._dataset.shards[shard]
        planned[url] += [_Planned(_Span(url, start, size), sample) for start, size in spans]
        return sum(size for _, size in spans)

    def _open(self, shard: int) -> bool:
        """Open a shard if its index has arrived; otherwise request the index."""
        if shard in self._dataset.opened:
            return True
        url = self._dataset.index_path(shard)
        if url not in self._indexes:
            self._indexes[url] = Range(url, 0, LONGEST)
            self._connections.add([self._indexes[url]])
        elif self._indexes[url].arrived():
            self._dataset.opened.read(shard, lambda opened: None)
            return True
        return False

    def _request(self, planned: dict[str, list[_Planned]]) -> None:
        """Merge spans and queue their requests."""
        ranges: list[_Merged] = []
        for spans in planned.values():
            last: _Merged | None = None
            for each in sorted(spans):
                here = self._spans[each.sample.number]
                if each.span in here:  # planned twice in a micro-batch
                    self._forget(each.sample.shard)
                    continue
                if last is None or not last.takes(each.span):
                    last = _Merged(each)
                    ranges.append(last)
                last.add(each)
                here[each.span] = last, each.sample
                self._requested += 1
        self._bytes += sum(each.size for each in ranges)
        ranges.sort(key=lambda each: each.first)
        self._connections.add(ranges)
