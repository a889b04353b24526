"""Other libraries' readers for `bifrost bench data`: they make the micro-batches of a job from the same samples.

Each is set up as in its documentation, with its defaults: samples shuffled, images decoded by Pillow, centre square and
bicubic resize as for webdataset, batches made in the worker processes. With our decoder they deliver images as stored.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ...data.bench import SHUFFLE, Job, own_images, pil_images, to_item
from ...data.errors import DataError
from ...data.shards import Dataset
from ...data.units import counted
from ...slurm.io import write_json
from ..versions import version

ENERGON_SHUFFLE = 100
"""Shuffle buffer and samples per sequence of Megatron-Energon, as in its documentation."""
STORED = {"png", "jpg", "jpeg"}
"""Extensions of images in shards."""
Sample = tuple[str, Any, Any]
"""Key, image and caption, as a library delivers them."""


@dataclass(frozen=True)
class OtherReader:
    """A reader to compare with.

    name: of its distribution. pipeline: makes a loader; its second argument is the folder of its samples, its last one
    whether it decodes with our decoder. convert: writes the samples in its format into an empty folder; None for a
    reader of the shards. http: whether it reads plain HTTP, not only object stores. install: arguments of pip.
    """

    name: str
    pipeline: Callable[[Job, Path, bool], Iterable[dict[str, Any]]]
    convert: Callable[[Job, Path], None] | None = None
    http: bool = False
    install: str | None = None

    @property
    def command(self) -> str:
        """What installs it."""
        return f"pip install {self.install or self.name}"

    def batches(self, job: Job, folder: Path, own_decoder: bool = False) -> Iterator[dict[str, Any]]:
        """Endless micro-batches of the samples that were prepared in `folder`. Raises DataError when there are none."""
        loader = self.pipeline(job, folder / self.name, own_decoder)
        while True:
            empty = True
            for batch in loader:
                empty = False
                yield batch
            if empty:
                raise DataError(
                    f"{self.name}: none of {counted(job.workers, 'worker')} has a micro-batch of {job.micro_batch}"
                    f" samples in an epoch of {len(job.dataset)}; use more samples or fewer workers"
                )

    def prepare(self, job: Job, folder: Path) -> int:
        """Write the converted samples to a folder of the reader's name in `folder`; returns bytes, without links."""
        (folder / self.name).mkdir()
        if self.convert:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                self.convert(job, folder / self.name)
        files = (folder / self.name).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _collated(job: Job, own_decoder: bool, unpack: Callable[[Any], Sample], samples: Sequence[Any]) -> dict[str, Any]:
    """A micro-batch of a library's samples."""
    images = own_images if own_decoder else _pil_decoded
    return job.collate([to_item(job, images, unpack(sample)) for sample in samples])


def _pil_decoded(image: bytes | Image.Image, sizes: Sequence[int]) -> list[Any]:
    opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return pil_images(opened.convert("RGB"), sizes)


def _loader_arguments(job: Job, collate: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    return {
        "batch_size": job.micro_batch,
        "num_workers": job.workers,
        "prefetch_factor": job.prefetch,
        "drop_last": True,
        "collate_fn": collate,
    }


def _columns(dataset: Dataset, place: tuple[int, int]) -> dict[str, Any]:
    raw = dataset.read(*place)
    return {"key": raw.key, "image": raw.image, "caption": raw.caption}


def _unpacked(columns: dict[str, Any]) -> Sample:
    return columns["key"], columns["image"], columns["caption"]


def _shard_bytes(job: Job) -> int:
    """Bytes of images per shard, so that converted samples are in about as many files as the shards."""
    return sum(map(len, job.images)) // len(job.dataset.shards) + 1


def _to_mds(job: Job, folder: Path) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    columns = {"key": "str", "image": "bytes", "caption": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=_shard_bytes(job)) as writer:
        for place in job.places:
            writer.write(_columns(job.dataset, place))


def _mosaic(job: Job, folder: Path, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=job.seed, batch_size=job.micro_batch)
    return DataLoader(dataset, **_loader_arguments(job, partial(_collated, job, own_decoder, _unpacked)))


def _to_chunks(job: Job, folder: Path) -> None:
    from litdata import optimize  # pyright: ignore[reportMissingImports]

    # Its working folders are otherwise the same ones for every process of the machine.
    with (
        tempfile.TemporaryDirectory() as work,
        _environment(DATA_OPTIMIZER_CACHE_FOLDER=f"{work}/chunks", DATA_OPTIMIZER_DATA_CACHE_FOLDER=f"{work}/data"),
    ):
        optimize(
            partial(_columns, job.dataset),
            job.places,
            output_dir=str(folder),
            chunk_bytes=_shard_bytes(job),
            num_workers=1,
            start_method="fork",
            keep_data_ordered=True,
            verbose=False,
        )


def _litdata(job: Job, folder: Path, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]

    dataset = StreamingDataset(str(folder), shuffle=True, seed=job.seed)
    return StreamingDataLoader(dataset, **_loader_arguments(job, partial(_collated, job, own_decoder, _unpacked)))


def _datasets(job: Job, folder: Path, own_decoder: bool) -> Iterable[dict[str, Any]]:
    import fsspec
    from datasets import Image as ImageColumn  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    files = {"train": job.urls or job.dataset.shards}
    rows: Any = load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=str(folder))
    stored = [name for name in rows.features if name in STORED]
    for name in stored if own_decoder else []:
        rows = rows.cast_column(name, ImageColumn(decode=False))

    def unpack(row: dict[str, Any]) -> Sample:
        image = next(row[name] for name in stored if row[name] is not None)
        return row["__key__"], image["bytes"] if own_decoder else image, row["txt"]

    # A worker would close the connections that it inherits, and with them unregister them from the event loop that it
    # shares with this process, whose next `load_dataset` would wait forever.
    fsspec.get_filesystem_class("http").clear_instance_cache()
    rows = rows.shuffle(seed=job.seed, buffer_size=SHUFFLE)
    return DataLoader(rows, **_loader_arguments(job, partial(_collated, job, own_decoder, unpack)))


def _to_energon(job: Job, folder: Path) -> None:
    """Indexes next to links to the shards."""
    from megatron.energon.flavors import BaseWebdatasetFactory  # pyright: ignore[reportMissingImports]

    names = [f"{number:05d}.tar" for number in range(len(job.dataset.shards))]
    for name, shard in zip(names, job.dataset.shards, strict=True):
        (folder / name).symlink_to(Path(shard).absolute())
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_patterns=[("train", ".*")], workers=1)
    settings = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_json(folder / ".nv-meta" / "dataset.yaml", settings)  # JSON is YAML


def _energon(job: Job, folder: Path, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from megatron import energon  # pyright: ignore[reportMissingImports]

    @energon.stateless
    def cook(parts: dict[str, Any]) -> energon.CaptioningSample:
        image = next(parts[name] for name in parts if name in STORED)
        return energon.CaptioningSample(**energon.basic_sample_keys(parts), image=image, caption=parts["txt"])

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None if own_decoder else energon.SampleDecoder(image_decode="pilrgb")
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[energon.CaptioningSample]) -> dict[str, Any]:
            return _collated(job, own_decoder, lambda each: (each.__key__, each.image, each.caption), samples)

    dataset = energon.get_train_dataset(
        folder,
        batch_size=job.micro_batch,
        shuffle_buffer_size=ENERGON_SHUFFLE,
        max_samples_per_sequence=ENERGON_SHUFFLE,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=job.workers),
        task_encoder=Encoder(),
    )
    return energon.get_loader(dataset, prefetch_factor=job.prefetch)


OTHER_READERS = (
    # Its requirements exclude transformers 5, xxhash 4 and numpy 2.2.
    OtherReader(
        "mosaicml-streaming",
        _mosaic,
        _to_mds,
        install="--no-deps mosaicml-streaming brotli catalogue cramjam python-snappy zstd torchvision",
    ),
    OtherReader("litdata", _litdata, _to_chunks),
    OtherReader("datasets", _datasets, http=True),
    OtherReader("megatron-energon", _energon, _to_energon),
)


def usable_readers(http: bool) -> tuple[list[OtherReader], list[str]]:
    """The readers to measure, and why each of the others is left out. http: the samples are read over HTTP."""
    found, reasons = [], []
    for reader in OTHER_READERS:
        if http and not reader.http:
            reasons.append(f"{reader.name} reads object stores, no plain HTTP; left out with --latency")
        elif version(reader.name) is None:
            reasons.append(f"{reader.name} is not installed and left out: {reader.command}")
        else:
            found.append(reader)
    return found, reasons
