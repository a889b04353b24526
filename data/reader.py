"""Micro-batches in the plan's order, read and decoded by worker processes."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from .buckets import Buckets
from .errors import DataError, DataLost
from .plan import Located, SampleOrder, Share, rank_positions
from .processes import START_METHOD, die_with_launcher
from .read_ahead import ReadAhead
from .retry import failure
from .samples import Item, ReadableSamples
from .shards import Dataset
from .sockets import make_socket_folder
from .transience import verdict

log = logging.getLogger(__name__)

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
FAILED_TO_SEND = 71
"""Exit code of a worker that cannot send a batch."""
GRACE_S = 2.0  # for workers to finish their micro-batch when the loader is closed


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    arrays: dict[str, Any]
    """Output of the collate function: tensors, and plain values that stay on the host."""
    keys: list[str]
    replaced: list[tuple[str, str]]
    """Key and reason of every planned sample that was unusable and replaced by a neighbour."""
    names: list[str] = field(default_factory=list)
    """`Dataset.name` of the samples that were read."""
    sources: list[int] = field(default_factory=list)
    """`Dataset.source` of every sample."""
    replaced_sources: list[int] = field(default_factory=list)
    """The same of those in `replaced`."""

    def pin_memory(self) -> Batch:
        pinned = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in self.arrays.items()}
        return replace(self, arrays=pinned)


Collate = Callable[[list[Item]], dict[str, Any]]


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader reads; the sequence of samples does not depend on it."""

    image_sizes: tuple[int, ...]
    """Sides of squares in pixels; the first is that of `Item.image`, the others those of `Item.others`."""
    workers: int = 0
    """Processes that read; 0 reads in the calling process."""
    prefetch: int = 2
    """Micro-batches prepared by each worker."""
    pin_memory: bool = False
    buckets: Buckets | None = None
    """Of the dataset, in whose shapes the images are instead."""


class Loader:
    """Iterates over one rank's micro-batches of `steps`, in order.

    collate: picklable, list of `micro_batch` items -> `Batch.arrays`; runs in the workers. The sequence depends only on
    the dataset, the plan and the share of the global batch. Every `iter` restarts at the first step. read: what makes
    items of samples.
    Raises DataLost when a shard becomes unreadable or a worker dies, DataError for what the user has to fix.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: SampleOrder,
        collate: Collate,
        share: Share,
        steps: range,
        settings: LoaderSettings,
        read: type[ReadableSamples] = ReadableSamples,
    ) -> None:
        if not np.array_equal(plan.samples_per_shard, dataset.samples_per_shard):
            raise DataError("the plan was made for other shards; make it from dataset.samples_per_shard")
        dataset.opened.max_open = max(dataset.opened.max_open, plan.open_shards)
        workers = settings.workers
        accumulation = len(rank_positions(0, *share))
        self.rank = share.rank
        if workers:
            make_socket_folder()
        self._micro_batches = range(steps.start * accumulation, steps.stop * accumulation)
        samples = read(dataset, settings.image_sizes, settings.buckets)
        self._source = _MicroBatches(samples, plan, collate, share, accumulation, self._micro_batches.stop)
        self._loader = DataLoader(
            self._source,
            batch_size=None,
            sampler=self._micro_batches,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=settings.pin_memory,
            prefetch_factor=settings.prefetch if workers else None,
            worker_init_fn=partial(_start_worker, reports=_reports()) if workers else None,
            multiprocessing_context=START_METHOD if workers else None,
            generator=torch.Generator(),  # otherwise every creation of workers draws from the caller's random state
        )
        self._running: Any = None

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        # Slurm signals every process of a job. Workers inherit a mask that blocks the stop signals, so that they are
        # never interrupted by one; the main process decides when to stop.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._running = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(self.close)
        try:
            yield from self._batches(self._running)
        finally:
            self.close()

    def _batches(self, running: Iterator[Batch | DataError]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(running)
            except StopIteration:
                return
            except Exception as error:
                raise worker_failure(error, self.rank) or error from error
            if isinstance(batch, DataError):
                raise type(batch)(f"rank {self.rank}: {batch}")
            yield batch

    def close(self) -> None:
        """Stop the workers, also unresponsive ones. The loader can be iterated again."""
        running, self._running = self._running, None
        atexit.unregister(self.close)
        self._source.close()
        workers = getattr(running, "_workers", None)
        if running is None or not workers:
            return
        # Torch waits 5 s for each worker in turn and then sends SIGTERM, which our workers block.
        last_resort = threading.Timer(GRACE_S, lambda: [worker.kill() for worker in workers])
        last_resort.start()
        try:
            with suppress(RuntimeError):  # torch's report that a worker was killed
                running._shutdown_workers()
        finally:
            last_resort.cancel()


def stacked(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack images [H, W, 3] into uint8 [B, 3, H, W] for a collate function; in a worker, directly in shared memory."""
    return default_collate([torch.from_numpy(image.transpose(2, 0, 1)) for image in images])


def worker_failure(error: Exception, rank: int) -> DataError | None:
    """Translate torch's error about a loader worker into one line; None for any other error. Torch raises the death of
    a worker from a signal handler, at an arbitrary point of the main process.

    Only a killed worker is retryable (DataLost): full shared memory stays full, and other errors recur. The original
    text is kept; a traceback goes to the log.
    """
    text = str(error)
    if isinstance(error, DataError) or not re.search("DataLoader worker|</torch_", text):
        return None
    reported = "" if (reports := _reports()).empty() else reports.get()
    text = reported or text
    if SHARED_MEMORY.search(text):
        return DataError(
            f"rank {rank}: a loader worker ran out of shared memory ({_last_line(text)}); enlarge /dev/shm (in"
            " containers --shm-size or --ipc=host), or lower data.workers or data.prefetch"
        )
    if reported:
        return DataError(
            f"rank {rank}: a loader worker cannot send its batches: {reported}; raise the limit of open files"
            " (ulimit -n) if it is reached, or set data.workers=0"
        )
    if "in DataLoader worker process" in text:
        log.error("rank %d: a loader worker failed:\n%s", rank, text)
        return DataError(f"rank {rank}: a loader worker failed: {_last_line(text)}; its traceback is in the log")
    first = text.partition("\n")[0].rstrip(". ")
    killed = re.search(r"killed by signal: ([\w ]+)", first)
    if killed is None or killed.group(1).strip() == "Killed":
        return DataLost(f"rank {rank}: {first}; look for out-of-memory kills, or lower data.workers")
    return DataError(f"rank {rank}: {first}; set data.workers=0 to see where it happens")


SHARED_MEMORY = re.compile(
    r"Bus error|shared memory|</torch_\d|/dev/shm|received 0 items of ancdata|unable to mmap|unable to write to file"
)
"""Matches torch's errors when shared memory is full for tensors sent by a worker."""


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), text)


def _start_worker(worker: int, reports: SimpleQueue) -> None:
    """Worker initialization. reports: receives one line with the reason before the worker ends itself."""
    die_with_launcher()

    def give_up(error: BaseException, batch: object) -> None:
        # Runs in the queue's feeder thread on EMFILE, a socket error or an unpicklable batch. By default it prints the
        # error, drops the batch and continues, and the consumer waits for that batch forever.
        reports.put(f"{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(FAILED_TO_SEND)

    Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]


@functools.cache
def _reports() -> SimpleQueue:
    """Queue of lines from this process's workers."""
    return get_context(START_METHOD).SimpleQueue()


def _as_is(batch: Any) -> Any:
    return batch


class _MicroBatches(TorchDataset):
    """Number of a rank's micro-batch, counted from step 0 -> `Batch`, or the DataError that occurred."""

    def __init__(
        self,
        samples: ReadableSamples,
        plan: SampleOrder,
        collate: Collate,
        share: Share,
        accumulation: int,
        stop: int,
    ) -> None:
        self.samples = samples
        self.dataset = dataset = samples.dataset
        self.plan = plan
        self.collate = collate
        self.share = share
        self.accumulation = accumulation
        self.stop = stop
        self._has_urls = any("://" in shard for shard in dataset.shards)
        self._ahead: ReadAhead | None = None

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __getitem__(self, number: int) -> Batch | DataError:
        located = self._locate(number)
        replaced: list[tuple[str, str]] = []
        try:
            if self._has_urls:
                self._request_ahead(number)
            items, sources, bad = [], [], []
            for epoch, shard, sample, index in zip(*(part.tolist() for part in located), strict=True):
                items.append(self.samples.read(epoch, shard, sample, index, replaced))
                sources.append(self.dataset.source(shard))
                bad += sources[-1:] * (len(replaced) - len(bad))
            names = [self.dataset.name(item.origin[0], item.key, item.caption_member) for item in items]
            return Batch(self.collate(items), [item.key for item in items], replaced, names, sources, bad)
        except Exception as error:  # an exception raised in a worker reaches the caller as the text of a traceback
            if isinstance(error, DataError):
                return error
            if verdict(error) is None:
                raise
            return failure("a loader worker", error)

    def _locate(self, number: int) -> Located:
        step, row = divmod(number, self.accumulation)
        return self.plan.locate(rank_positions(step, *self.share)[row])

    def _request_ahead(self, number: int) -> None:
        if self._ahead is None or self._ahead.pid != os.getpid():
            # DataLoader passes the micro-batches to its workers in turn.
            worker = get_worker_info()
            numbers = range(number, self.stop, worker.num_workers if worker else 1)
            self._ahead = ReadAhead(self.dataset, self._samples, numbers)
        self._ahead.advance(number)

    def _samples(self, number: int) -> Iterator[tuple[int, int, int, int]]:
        """Shard, number within it, epoch and index of each sample of a micro-batch."""
        epoch, shard, sample, index = (part.tolist() for part in self._locate(number))
        return zip(shard, sample, epoch, index, strict=True)
