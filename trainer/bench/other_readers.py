"""Other libraries' readers for `bifrost bench data`: they make the micro-batches of a job from the same samples.

Each is set up as in its documentation, with its defaults: samples shuffled, images decoded by Pillow, centre square and
bicubic resize as for webdataset, batches made in the worker processes. With our decoder they deliver stored images.
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
from typing import Any, NamedTuple

from PIL import Image

from ...data.bench import SHUFFLE, Job, own_images, pil_images, to_item
from ...data.shards import Dataset
from ...slurm.io import write_json
from ..versions import version

BUCKET = "bench"
"""Bucket of the server with the converted samples: a folder per reader."""
ENERGON_SHUFFLE = 100
"""Shuffle buffer and samples per sequence of Megatron-Energon, as in its documentation."""
STORED = {"png", "jpg", "jpeg"}
"""Extensions of images in shards."""
Sample = tuple[str, Any, Any]
"""Key, image and caption, as a library delivers them."""


class Source(NamedTuple):
    """Where a reader reads. folder: the samples in its format. served: whether they are read from `BUCKET` of the
    server in the environment, not from `folder`. cache: empty folder for downloads."""

    folder: Path
    served: bool
    cache: Path

    @property
    def key(self) -> str:
        """Name of the folder within the bucket."""
        return self.folder.name


@dataclass(frozen=True)
class OtherReader:
    """A reader to compare with.

    name: of its distribution. pipeline: makes a loader; its last argument is whether it decodes with our decoder.
    convert: writes the samples in its format into an empty folder; None for a reader of the shards. install: arguments
    of pip.
    """

    name: str
    pipeline: Callable[[Job, Source, bool], Iterable[dict[str, Any]]]
    convert: Callable[[Job, Path], None] | None = None
    install: str = '"bifrost-train[bench]"'

    def batches(self, job: Job, folder: Path, served: bool, own_decoder: bool = False) -> Iterator[dict[str, Any]]:
        """Endless micro-batches. The folder for downloads is a new one, so that nothing has been downloaded before."""
        with tempfile.TemporaryDirectory(prefix="bifrost-", ignore_cleanup_errors=True) as cache:
            endless = _repeated(self.pipeline(job, Source(folder / self.name, served, Path(cache)), own_decoder))
            try:
                yield from endless
            finally:
                endless.close()  # ends the workers, which write to the folder

    def prepare(self, job: Job, folder: Path) -> int:
        """Write the converted samples to a folder of the reader's name in `folder`; returns bytes, without links."""
        (folder / self.name).mkdir()
        if self.convert:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                self.convert(job, folder / self.name)
        files = (folder / self.name).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


@contextmanager
def s3_environment(endpoint: str, folder: Path) -> Iterator[None]:
    """Environment in which the readers' S3 clients use `endpoint`; `folder` takes Multi-Storage Client's settings."""
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_ALLOW_HTTP": "true"}
    storage = {"type": "s3", "options": {"base_path": BUCKET, "region_name": "us-east-1", "endpoint_url": endpoint}}
    credentials = {"type": "S3Credentials", "options": {"access_key": "bench", "secret_key": "bench"}}
    profile = {"storage_provider": storage, "credentials_provider": credentials}
    write_json(folder / "storage.json", {"profiles": {_profile(endpoint): profile}})
    settings["MSC_CONFIG"] = str(folder / "storage.json")
    with _environment(**settings, AWS_PROFILE=None, AWS_SESSION_TOKEN=None, S3_ENDPOINT_URL=None):
        yield


@contextmanager
def _environment(**settings: str | None) -> Iterator[None]:
    """Variables set, or removed if None."""
    before = dict(os.environ)
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _profile(endpoint: str) -> str:
    """A name per server: the client keeps one connection per profile and process."""
    return f"{BUCKET}-{endpoint.rpartition(':')[2]}"


def _repeated(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


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


def _mosaic(job: Job, source: Source, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    remote = {"remote": f"s3://{BUCKET}/{source.key}", "local": str(source.cache)}
    dataset = StreamingDataset(
        **(remote if source.served else {"local": str(source.folder)}),
        shuffle=True,
        shuffle_seed=job.seed,
        batch_size=job.micro_batch,
    )
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


def _litdata(job: Job, source: Source, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from litdata import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]

    remote = {"input_dir": f"s3://{BUCKET}/{source.key}", "cache_dir": str(source.cache)}
    dataset = StreamingDataset(
        **(remote if source.served else {"input_dir": str(source.folder)}), shuffle=True, seed=job.seed
    )
    return StreamingDataLoader(dataset, **_loader_arguments(job, partial(_collated, job, own_decoder, _unpacked)))


def _datasets(job: Job, source: Source, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from datasets import Image as ImageColumn  # pyright: ignore[reportMissingImports]
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    shards = job.urls if source.served else job.dataset.shards
    rows = load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=True, cache_dir=str(source.cache)
    )
    stored = [name for name in rows.features if name in STORED]
    for name in stored if own_decoder else []:
        rows = rows.cast_column(name, ImageColumn(decode=False))

    def unpack(row: dict[str, Any]) -> Sample:
        image = next(row[name] for name in stored if row[name] is not None)
        return row["__key__"], image["bytes"] if own_decoder else image, row["txt"]

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


def _energon(job: Job, source: Source, own_decoder: bool) -> Iterable[dict[str, Any]]:
    from megatron import energon  # pyright: ignore[reportMissingImports]

    def cook(parts: dict[str, Any]) -> energon.CaptioningSample:
        image = next(parts[name] for name in parts if name in STORED)
        return energon.CaptioningSample(**energon.basic_sample_keys(parts), image=image, caption=parts["txt"])

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None if own_decoder else energon.SampleDecoder(image_decode="pilrgb")
        cookers = [energon.Cooker(cook)]  # noqa: RUF012

        def batch(self, samples: list[energon.CaptioningSample]) -> dict[str, Any]:
            return _collated(job, own_decoder, lambda each: (each.__key__, each.image, each.caption), samples)

    remote = f"msc://{_profile(os.environ['AWS_ENDPOINT_URL'])}/{source.key}" if source.served else None
    dataset = energon.get_train_dataset(
        remote or source.folder,
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
        install="--no-deps mosaicml-streaming brotli catalogue cramjam python-snappy zstd",
    ),
    OtherReader("litdata", _litdata, _to_chunks),
    OtherReader("datasets", _datasets),
    OtherReader("megatron-energon", _energon, _to_energon),
)


def installed_readers() -> tuple[list[OtherReader], list[OtherReader]]:
    """The readers that are installed, and those that are not."""
    found = [reader for reader in OTHER_READERS if version(reader.name)]
    return found, [reader for reader in OTHER_READERS if reader not in found]
