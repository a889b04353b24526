"""Samples a second of the reader, beside what the processor can decode and beside a plain webdataset pipeline.

Every rival turns the same shards into the same micro-batches with as many processes. They take turns, round after
round, so that a machine that is slow for a while is slow for all.
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
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import DataError
from .index import image_type
from .plan import Plan, rank_positions
from .processes import die_with_starter
from .reader import Collate, Item, Loader, stacked
from .shards import Dataset, open_dataset
from .transforms import centre_square, decode_sizes, resized

SHUFFLE = 1000
"""Samples that webdataset's pipeline shuffles together, as its documentation has it."""
PLAIN_IMAGES = "jpg;jpeg;png"
"""What webdataset's `decode("pil")` takes."""
PARTS = ("read", "decode", "resize", "collate")


@dataclass
class Job:
    """What all rivals do. sizes: pixels of a side of each image's copies; collate as the loader's."""

    dataset: Dataset
    collate: Collate
    sizes: tuple[int, ...]
    micro_batch: int
    workers: int
    prefetch: int = 2
    block: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.dataset) < self.micro_batch:
            raise DataError(f"{len(self.dataset)} samples are fewer than a micro-batch of {self.micro_batch}: add some")
        if len(self.dataset.shards) < self.workers:
            raise DataError(
                f"{len(self.dataset.shards)} shards for {self.workers} workers: webdataset gives every worker its own;"
                " take fewer workers or more shards"
            )

    @property
    def batches(self) -> int:
        """Micro-batches of one epoch, in which every sample comes about once: what a round measures."""
        return len(self.dataset) // self.micro_batch

    @property
    def warm(self) -> int:
        """Micro-batches before them: all that is prepared ahead, and one more a worker."""
        return self.workers * (self.prefetch + 1)

    @cached_property
    def plan(self) -> Plan:
        return Plan(self.dataset.samples_per_shard, self.seed, self.block)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Shard, and number within it, of every sample."""
        return [(s, n) for s, count in enumerate(self.dataset.samples_per_shard.tolist()) for n in range(count)]

    @cached_property
    def images(self) -> list[bytes]:
        """Every image as stored, in memory."""
        return [self.dataset.read(*place).image for place in self.places]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Key -> number within the data set."""
        return {self.dataset.entry(*place)[0]: number for number, place in enumerate(self.places)}


def first_shards(spec: str | list[str], samples: int, workers: int) -> Dataset:
    """The first shards of a data set that hold `samples` samples and are one a worker at least."""
    dataset = open_dataset(spec)
    enough = int(np.searchsorted(np.cumsum(dataset.samples_per_shard), samples)) + 1
    chosen = dataset.shards[: max(enough, workers)]
    return dataset if len(chosen) == len(dataset.shards) else open_dataset(chosen)


def stack(items: list[Item]) -> dict[str, Any]:
    """The plainest collate: images uint8 [B, 3, S, S] and captions."""
    return {"images": stacked([item.image for item in items]), "captions": [item.caption for item in items]}


def pil_alone(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Pillow's shortest way from a stored RGB image to its centre squares, nothing checked and nothing turned."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (max(sizes), max(sizes)))
    return [np.asarray(_pil_resized(image.convert("RGB"), size)) for size in sizes]


def _pil_resized(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def decode_rate(job: Job, decode: Callable[[bytes, Sequence[int]], object]) -> float:
    """Images a second of `decode` alone, with every image in memory and nothing passed on."""
    images = job.images
    seconds, _ = in_processes(lambda number: decode(images[number], job.sizes), len(images), job.workers)
    return len(images) / seconds


def reader_batches(job: Job) -> Iterator[dict[str, Any]]:
    """Micro-batches of the reader as training uses it."""
    loader = Loader(
        job.dataset,
        job.plan,
        job.collate,
        image_size=job.sizes,
        rank=0,
        ranks=1,
        global_batch=job.micro_batch,
        micro_batch=job.micro_batch,
        stop_step=2 * job.warm + job.batches,  # the workers still work when the last measured one arrives
        workers=job.workers,
        prefetch=job.prefetch,
    )
    for batch in loader:
        yield batch.arrays


def webdataset_batches(job: Job, own_decoder: bool = False) -> Iterator[dict[str, Any]]:
    """Micro-batches of a pipeline as webdataset's documentation writes it, endless: shards shuffled and divided among
    the workers, a shuffle buffer, decoding by Pillow, batches made in the workers. own_decoder: by ours instead."""
    from webdataset.compat import WebDataset, WebLoader

    if any(image_type(job.dataset.entry(*place)[1]) == "webp" for place in job.places):
        raise DataError("some images are WebP, which webdataset's decoder does not know; name shards of JPEG or PNG")
    pipeline: Any = WebDataset(job.dataset.shards, shardshuffle=100, seed=job.seed)
    pipeline = pipeline.repeat().shuffle(SHUFFLE)
    if not own_decoder:
        pipeline = pipeline.decode("pil")
    pipeline = (
        pipeline.to_tuple("__key__", PLAIN_IMAGES, "txt")
        .map(partial(_item, job, _own_images if own_decoder else _plain_images))
        .batched(job.micro_batch, collation_fn=job.collate)
    )
    return iter(WebLoader(pipeline, batch_size=None, num_workers=job.workers, prefetch_factor=job.prefetch))


def _plain_images(image: Image.Image, sizes: Sequence[int]) -> list[np.ndarray]:
    return [np.array(_pil_resized(image, size)) for size in sizes]  # torch wants them writable


def _own_images(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    return decode_sizes(data, sizes)


def _item(job: Job, images: Callable, sample: tuple[str, Any, Any]) -> Item:
    key, stored, caption = sample
    number = job.numbers[os.path.basename(key)]
    first, *others = images(stored, job.sizes)
    text = caption if isinstance(caption, str) else caption.decode()
    return Item(0, number, key, first, text, tuple(others), job.places[number])


def rate(job: Job, batches: Iterable[dict[str, Any]]) -> float:
    """Samples a second of one epoch of `batches`, after the warm-up."""
    running = iter(batches)
    for _ in islice(running, job.warm):
        pass
    begun = time.perf_counter()
    count = sum(1 for _ in islice(running, job.batches))
    seconds = time.perf_counter() - begun
    assert count == job.batches
    getattr(running, "close", lambda: None)()
    return count * job.micro_batch / seconds


def parts(job: Job) -> dict[str, float]:
    """Seconds of a process that a sample takes in each of the reader's parts, in as many processes as it has."""
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
    """Seconds that `processes` processes take for work(0) .. work(count - 1), each done by whoever is free, and the
    results in no order. DataError when one of them dies."""
    context = get_context("fork")
    results, following, ready = context.Queue(), context.Value("q", 0), context.Barrier(processes)

    def child() -> None:
        die_with_starter()
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
