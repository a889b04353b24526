"""Throughput of the reader in samples per second, next to pure decoding and to a plain webdataset pipeline.

All baselines turn the same shards into the same micro-batches with the same number of processes. They take turns in
rounds, so that a temporarily slow machine affects them equally.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .errors import DataError
from .index import image_type
from .plan import Plan, Share, rank_positions
from .processes import die_with_launcher
from .reader import Collate, Loader, LoaderSettings, stacked
from .samples import Item
from .shards import Dataset, open_dataset
from .transforms import centre_square, decode_sizes, resized
from .units import counted

SHUFFLE = 1000
"""Shuffle buffer of webdataset's pipeline in samples, as in its documentation."""
PLAIN_IMAGES = "jpg;jpeg;png"
"""Image extensions that webdataset's `decode("pil")` supports."""
PARTS = ("read", "decode", "resize", "collate")


class Rate(NamedTuple):
    """Throughput after the warm-up. first_s: seconds from the creation of a pipeline to its first micro-batch; None
    without a pipeline."""

    samples_per_s: float
    first_s: float | None = None


@dataclass
class Job:
    """The work of all baselines.

    sizes: sides in pixels of each image's copies. collate: as for the loader. urls: of the same shards, where the
    reader and webdataset read them.
    """

    dataset: Dataset
    collate: Collate
    sizes: tuple[int, ...]
    micro_batch: int
    workers: int
    prefetch: int = 2
    block: int = 16
    seed: int = 0
    urls: list[str] | None = None

    def __post_init__(self) -> None:
        if len(self.dataset) < self.micro_batch:
            raise DataError(f"fewer samples ({len(self.dataset)}) than a micro-batch of {self.micro_batch}: add some")
        if len(self.dataset.shards) < self.workers:
            raise DataError(
                f"{counted(len(self.dataset.shards), 'shard')} for {self.workers} workers: webdataset gives each worker"
                " its own; use fewer workers or more shards"
            )

    @property
    def batches(self) -> int:
        """Micro-batches that a round measures: an epoch without the warm-up, at least half of one. The end of an epoch,
        where some readers restart their workers, is not measured."""
        epoch = len(self.dataset) // self.micro_batch
        return max(epoch - self.warm, (epoch + 1) // 2)

    @property
    def warm(self) -> int:
        """Warm-up micro-batches: everything that is prefetched, plus one per worker."""
        return self.workers * (self.prefetch + 1)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.dataset.samples_per_shard, self.seed, self.block)

    @cached_property
    def measured(self) -> Dataset:
        """The dataset that the reader reads."""
        return open_dataset(self.urls) if self.urls else self.dataset

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Shard and number within it of every sample."""
        return [(s, n) for s, count in enumerate(self.dataset.samples_per_shard.tolist()) for n in range(count)]

    @cached_property
    def images(self) -> list[bytes]:
        """Every image as stored, in memory."""
        return [self.dataset.read(*place).image for place in self.places]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Key -> number within the dataset."""
        return {self.dataset.entry(*place)[0]: number for number, place in enumerate(self.places)}


def first_shards(spec: str | list[str], samples: int, workers: int) -> Dataset:
    """The first shards of a dataset with `samples` samples in all, and at least one shard per worker."""
    dataset = open_dataset(spec)
    enough = int(np.searchsorted(np.cumsum(dataset.samples_per_shard), samples)) + 1
    chosen = dataset.shards[: max(enough, workers)]
    return dataset if len(chosen) == len(dataset.shards) else open_dataset(chosen)


def stack(items: list[Item]) -> dict[str, Any]:
    """Minimal collate function: images uint8 [B, 3, S, S] and captions."""
    return {"images": stacked([item.image for item in items]), "captions": [item.caption for item in items]}


def pil_alone(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """The shortest path with Pillow from a stored RGB image to its centre squares, without checks or rotation."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (max(sizes), max(sizes)))
    return [np.asarray(_pil_resized(image.convert("RGB"), size)) for size in sizes]


def _pil_resized(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def decode_rate(job: Job, decode: Callable[[bytes, Sequence[int]], object]) -> Rate:
    """Images per second of `decode` alone, with every image in memory and results discarded."""
    images = job.images
    seconds, _ = in_processes(lambda number: decode(images[number], job.sizes), len(images), job.workers)
    return Rate(len(images) / seconds)


def reader_batches(job: Job) -> Iterator[dict[str, Any]]:
    """Endless micro-batches of the reader as training uses it."""
    loader = Loader(
        job.measured,
        job.plan,
        job.collate,
        Share(0, 1, job.micro_batch, job.micro_batch),
        range(1 << 30),  # workers are still busy, and still read ahead, when the last measured batch arrives
        LoaderSettings(job.sizes, job.workers, job.prefetch),
    )
    for batch in loader:
        yield batch.arrays


def webdataset_batches(job: Job, own_decoder: bool = False) -> Iterator[dict[str, Any]]:
    """Endless micro-batches of the pipeline in webdataset's documentation: shards shuffled and split among the workers,
    a shuffle buffer, decoding by Pillow, batches made in the workers. own_decoder: decode with ours instead."""
    from webdataset.compat import WebDataset, WebLoader

    if any(image_type(job.dataset.entry(*place)[1]) == "webp" for place in job.places):
        raise DataError("some images are WebP, which webdataset's decoder does not support; name shards of JPEG or PNG")
    pipeline: Any = WebDataset(job.urls or job.dataset.shards, shardshuffle=100, seed=job.seed)
    pipeline = pipeline.repeat().shuffle(SHUFFLE)
    if not own_decoder:
        pipeline = pipeline.decode("pil")
    pipeline = (
        pipeline.to_tuple("__key__", PLAIN_IMAGES, "txt")
        .map(partial(to_item, job, own_images if own_decoder else pil_images))
        .batched(job.micro_batch, collation_fn=job.collate)
    )
    return iter(WebLoader(pipeline, batch_size=None, num_workers=job.workers, prefetch_factor=job.prefetch))


def pil_images(image: Image.Image, sizes: Sequence[int]) -> list[np.ndarray]:
    """Centre squares uint8 [S, S, 3] of an RGB image, resized by Pillow."""
    return [np.array(_pil_resized(image, size)) for size in sizes]  # torch wants them writable


def own_images(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Centre squares uint8 [S, S, 3] of a stored image, decoded and resized as the reader does."""
    return decode_sizes(data, sizes)


def to_item(
    job: Job, images: Callable[[Any, Sequence[int]], list[np.ndarray]], sample: tuple[str, Any, str | bytes]
) -> Item:
    """The item of a sample of another library's reader: its key, after any folder, what `images` takes, and its
    caption."""
    key, stored, caption = sample
    number = job.numbers[os.path.basename(key)]
    first, *others = images(stored, job.sizes)
    text = caption if isinstance(caption, str) else caption.decode()
    return Item(0, number, key, first, text, tuple(others), job.places[number])


def rate(job: Job, pipeline: Callable[[], Iterable[dict[str, Any]]]) -> Rate:
    """Throughput of the micro-batches of `pipeline()`: of `job.batches` after `job.warm`."""
    created = time.perf_counter()
    running = iter(pipeline())
    next(running)
    first = time.perf_counter() - created
    for _ in islice(running, job.warm - 1):
        pass
    begun = time.perf_counter()
    counts = [len(next(iter(batch.values()))) for batch in islice(running, job.batches)]
    seconds = time.perf_counter() - begun
    assert len(counts) == job.batches
    getattr(running, "close", lambda: None)()
    return Rate(sum(counts) / seconds, first)


def parts(job: Job) -> dict[str, float]:
    """Process seconds per sample of each of the reader's parts, in `workers` processes."""
    _, spent = in_processes(partial(_timed, job), job.batches, job.workers)
    return {name: sum(each[i] for each in spent) / (job.batches * job.micro_batch) for i, name in enumerate(PARTS)}


def _timed(job: Job, step: int) -> tuple[float, ...]:
    clock = [0.0] * len(PARTS)

    def lap(part: str, since: float) -> float:
        now = time.perf_counter()
        clock[PARTS.index(part)] += now - since
        return now

    now = time.perf_counter()
    located = job.plan.locate(rank_positions(step, 0, 1, job.micro_batch, job.micro_batch)[0])
    items = []
    for epoch, shard, sample, index in zip(*(part.tolist() for part in located), strict=True):
        raw = job.dataset.read(shard, sample)
        now = lap("read", now)
        square = centre_square(raw.image, max(job.sizes))
        now = lap("decode", now)
        first, *others = (resized(square, size) for size in job.sizes)
        now = lap("resize", now)
        items.append(Item(epoch, index, raw.key, first, raw.caption, tuple(others), (shard, sample)))
    job.collate(items)
    lap("collate", now)
    return tuple(clock)


def in_processes(work: Callable[[int], Any], count: int, processes: int) -> tuple[float, list[Any]]:
    """Seconds that `processes` processes take for work(0) .. work(count - 1), each done by the next free process, and
    the results in no particular order. Raises DataError when a process dies."""
    context = get_context("fork")
    results, following, ready = context.Queue(), context.Value("q", 0), context.Barrier(processes)

    def child() -> None:
        die_with_launcher()
        torch.set_num_threads(1)
        ready.wait()
        begun, done = time.perf_counter(), []
        while True:
            with following.get_lock():
                number = following.value
                following.value += 1
            if number >= count:
                break
            done.append(work(number))
        results.put((begun, time.perf_counter(), done))

    children = [context.Process(target=child, daemon=True) for _ in range(processes)]
    for each in children:
        each.start()
    ended = []
    while len(ended) < processes:
        if any(each.exitcode for each in children):
            raise DataError("a process of the benchmark died; run `bifrost data verify` on the shards")
        if not results.empty():
            ended.append(results.get())
        time.sleep(0.005)
    for each in children:
        each.join()
    starts, ends, done = zip(*ended, strict=True)
    return max(ends) - min(starts), [result for each in done for result in each]
