"""`bifrost bench data`: the reader against the decode limit of the machine and against other libraries' readers, on
local files or over HTTP."""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from ...data import bench as reader_bench
from ...data.files import is_local
from ...data.photos import QUALITY, make_photos
from ...data.transforms import decode_sizes
from ...recipes import load_recipe
from ..errors import RunError
from ..terminal import terminal
from .machine import format_machine, machine, usable_cores, write_record
from .other_readers import OtherReader, usable_readers
from .range_server import latency_seconds, served

READER = "our reader"
OWN, PIL, PLAIN = "our decoder alone", "Pillow alone", "webdataset"
MIXED = "{}, our decoder"
"""Another library's reader with our decoder."""
SHARDS = 16
"""Number of shards of generated images."""


def bench(
    source: str | None,
    overrides: Sequence[str] = (),
    *,
    samples: int = 1024,
    workers: int | None = None,
    rounds: int = 5,
    sides: str = "512,1024",
    latency: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure, print and return the record; `out` is a folder for `data.json`. source: shards, a recipe, or None for
    generated images of `sides`. latency: the readers read from an HTTP server whose responses begin so late, such as
    `30ms`; None reads the files."""
    workers = workers or len(usable_cores())
    if overrides and source and _names_shards(source):
        raise RunError(f"{overrides[0]}: overrides need a recipe, {source} are shards; give a recipe or remove it")
    latency_s = None if latency is None else latency_seconds(latency)
    with ExitStack() as stack:
        job = stack.enter_context(_job(source, overrides, samples, workers, sides))
        if latency_s is not None:
            _check_servable(job.dataset.shards)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bifrost-")))
        others = _prepared(job, folder, http=latency_s is not None)
        if latency_s is not None:
            job.urls = stack.enter_context(served(job.dataset.shards, latency_s))
        sizes = np.array([_side(data) for data in job.images[:256]])
        record: dict[str, Any] = {
            "source": source or f"generated: JPEG, quality {QUALITY}, shorter side {sides.replace(',', ' to ')} px",
            "samples": job.batches * job.micro_batch,
            "shorter_side": [int(value) for value in np.percentile(sizes, (0, 50, 100))],
            "image_bytes": round(statistics.mean(map(len, job.images))),
            "image_size": list(job.sizes),
            "micro_batch": job.micro_batch,
            "processes": workers,
            "latency_s": latency_s,
            "machine": machine("pillow", "webdataset", "numpy", "aiohttp", *(each.name for each in others)),
            "converted_bytes": {each.name: size for each, size in others.items() if each.convert},
        }
        turns = _turns(job, others, folder)
        measured = [_round(turns, number) for number in range(rounds)]
        # Not interleaved with the baselines, so that the parts add up.
        parts = [reader_bench.parts(job) for _ in range(rounds)]
    rates = {name: [one[name].samples_per_s for one in measured] for name in turns}
    firsts = {name: [first for one in measured if (first := one[name].first_s) is not None] for name in turns}
    spent = {name: statistics.median(one[name] for one in parts) for name in reader_bench.PARTS}
    a_sample = workers / statistics.median(rates[READER])
    record["rates"] = rates
    record["samples_per_s"] = {name: statistics.median(values) for name, values in rates.items()}
    record["first_batch_s"] = {name: statistics.median(values) for name, values in firsts.items() if values}
    record["reader_over"] = {
        name: statistics.median(a / b for a, b in zip(rates[READER], values, strict=True))
        for name, values in rates.items()
        if name != READER
    }
    record["seconds_per_sample"] = {**spent, "queue and the rest": a_sample - sum(spent.values())}
    _show(record)
    if out:
        write_record(out, "data.json", record)
    return record


def _check_servable(shards: list[str]) -> None:
    if remote := [shard for shard in shards if not is_local(shard)]:
        raise RunError(f"{remote[0]}: --latency serves local shards; leave it out, or name local ones")
    if shutil.which("curl") is None:
        raise RunError("--latency: webdataset reads URLs with curl, which is not installed; install it")


def _prepared(job: reader_bench.Job, folder: Path, http: bool) -> dict[OtherReader, int]:
    """Readers to measure -> bytes of the samples that each converted into `folder`; prints why others are left out."""
    console = terminal()
    found, reasons = usable_readers(http)
    for reason in reasons:
        console.print(reason, soft_wrap=True)
    return {reader: reader.prepare(job, folder) for reader in found}


def _names_shards(source: str) -> bool:
    """Whether a source is shards or a folder of them, not a recipe."""
    return source.endswith((".tar", "*")) or "://" in source or any(Path(source).glob("*.tar"))


@contextmanager
def _job(
    source: str | None, overrides: Sequence[str], samples: int, workers: int, sides: str
) -> Iterator[reader_bench.Job]:
    if source is None:
        with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
            spec = make_photos(Path(folder), samples, max(SHARDS, workers), _sides(sides))
            yield _images_only(spec, samples, workers)
    elif _names_shards(source):
        yield _images_only(source, samples, workers)
    else:
        from ..training.run_context import open_run_stage

        recipe = load_recipe(source, overrides)
        stage = open_run_stage(recipe)
        chosen = reader_bench.first_shards(recipe.data.named, samples, workers)
        batch, data = recipe.micro_batch, recipe.data
        yield reader_bench.Job(
            chosen,
            stage.collate(chosen),
            stage.image_sizes,
            batch,
            workers,
            data.prefetch,
            data.shuffle_window,
            recipe.seed,
        )


def _images_only(shards: str, samples: int, workers: int) -> reader_bench.Job:
    """The job without a recipe: images of 448 px in micro-batches of 16."""
    return reader_bench.Job(
        reader_bench.first_shards(shards, samples, workers), reader_bench.stack, (448,), 16, workers
    )


def _turns(
    job: reader_bench.Job, others: Mapping[OtherReader, int], folder: Path
) -> dict[str, Callable[[], reader_bench.Rate]]:
    """Name -> measurement of the reader, both limits and every baseline, in the order of the table."""
    pipelines: dict[str, Callable[..., Any]] = {PLAIN: partial(reader_bench.webdataset_batches, job)}
    pipelines |= {other.name: partial(other.batches, job, folder) for other in others}
    turns: dict[str, Callable[[], reader_bench.Rate]] = {
        READER: partial(reader_bench.rate, job, partial(reader_bench.reader_batches, job)),
        OWN: partial(reader_bench.decode_rate, job, decode_sizes),
        PIL: partial(reader_bench.decode_rate, job, reader_bench.pil_alone),
    }
    for name, pipeline in pipelines.items():
        turns[name] = partial(reader_bench.rate, job, pipeline)
        turns[MIXED.format(name)] = partial(reader_bench.rate, job, partial(pipeline, own_decoder=True))
    return turns


def _round(turns: Mapping[str, Callable[[], reader_bench.Rate]], number: int) -> dict[str, reader_bench.Rate]:
    """One measurement of each; the first to run rotates from round to round."""
    names = list(turns)
    first = number % len(names)
    return {name: turns[name]() for name in names[first:] + names[:first]}


def _sides(text: str) -> tuple[int, int]:
    try:
        least, most = (int(word) for word in text.split(","))
    except ValueError:
        least, most = 0, 0
    if not 0 < least <= most:
        raise RunError(f"--sides {text}: give minimum and maximum pixels of the shorter side, such as 512,1024")
    return least, most


def _side(data: bytes) -> int:
    return min(Image.open(io.BytesIO(data)).size)


def _show(record: dict[str, Any]) -> None:
    console = terminal()
    low, middle, high = record["shorter_side"]
    size = ", ".join(map(str, record["image_size"]))
    latency = record["latency_s"]
    over = "" if latency is None else f" over HTTP with {1000 * latency:g} ms latency"
    console.print(
        f"{record['samples']:,} samples of {record['source']}: shorter side {low} to {high} px (median {middle}),"
        f" {record['image_bytes'] / 1000:.0f} kB each; to {size} px, micro_batch {record['micro_batch']},"
        f" {record['processes']} processes{over}.",
        soft_wrap=True,
    )
    for name, size in record["converted_bytes"].items():
        console.print(f"{name} reads samples converted before the rounds: {size / 1e6:.1f} MB.", soft_wrap=True)
    columns = ("", "version", "samples/s", "reader / it", "first batch, s", "rounds")
    table = Table(*columns, title="Samples per second, medians", title_justify="left")
    for name, value in record["samples_per_s"].items():
        over, first = record["reader_over"].get(name), record["first_batch_s"].get(name)
        version = record["machine"]["versions"].get(name.partition(",")[0], "")
        each = " ".join(f"{rate:.0f}" for rate in record["rates"][name])
        ratio, seconds = (f"{value:.2f}" if value is not None else "" for value in (over, first))
        table.add_row(name, version, f"{value:.0f}", ratio, seconds, each)
    console.print(table)
    whole = sum(record["seconds_per_sample"].values())
    table = Table("", "ms per sample", "share", title="Time of a process", title_justify="left")
    for name, seconds in record["seconds_per_sample"].items():
        table.add_row(name, f"{1000 * seconds:.3f}", f"{seconds / whole:.1%}")
    console.print(table)
    console.print(format_machine(record["machine"]), soft_wrap=True)
