"""`bifrost data encode`: store the outputs of frozen parts for every sample, for parts placed as `cached`.

Rank r takes shards r, r + size, … independently of other ranks; `stages/latent_cache.py` describes the files.
"""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ...data import DataError, Dataset, MixedDataset, open_dataset
from ...data.files import is_local, write
from ...data.progress import track
from ...data.remote import filesystem
from ...data.tars import TarInput, scan
from ...data.units import counted, format_bytes
from ...data.upload import remove, require_store, staged
from ...data.write import write_shard
from ...recipes.schema import Data
from ..errors import RunError
from . import latent_cache
from .latent_cache import FrozenOutputs
from .training_data import caption_choice, open_training_data

TAR_BYTES = 4096
"""Upper bound of what tar, safetensors and indexes take per sample in addition to the values."""
EMPTY = "__empty__"
"""Key of the empty caption in a text cache."""


def encode(outputs: Sequence[FrozenOutputs], data: Data, held_out: str | list[str] | None, micro_batch: int) -> int:
    """Encode this rank's shards for each of `outputs`, skipping complete ones. Returns 0. held_out: shards to encode in
    addition to the training `data`; micro_batch: samples encoded at a time.

    RunError and DataError name what cannot be used.
    """
    rank, ranks, local = (int(os.environ.get(*d)) for d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    latent_cache.require_one_caption(outputs, data)
    dataset = open_training_data(data)
    if held_out:
        further = open_dataset(held_out, captions=caption_choice(data.captions, 0), index_dir=data.index_dir)
        dataset = MixedDataset(["training", "validation"], [dataset, further])
    encoders = [_Encoder(one, dataset, micro_batch, device) for one in outputs]
    _require_space(encoders, dataset, shown=rank == 0)
    for encoder in encoders:
        try:
            print(encoder.run(rank, ranks), flush=True)
        except (RunError, DataError) as error:  # specific to this rank's shards, so name the rank
            raise RunError(f"rank {rank}: {error}") from error
    return 0


def _require_space(encoders: Sequence[_Encoder], dataset: Dataset, shown: bool) -> None:
    """RunError when a local file system is too small for what is missing of the caches, DataError for storage that they
    cannot be written to. shown: print the sizes."""
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for encoder in encoders:
        samples, sample = 0, encoder.outputs.sample_bytes
        for shard, header in zip(dataset.shards, dataset.headers, strict=True):
            tar = encoder.tar(shard)
            require_store(tar)
            if latent_cache.read_header(tar) is None:
                samples += header.samples
                if is_local(tar):
                    folder = next(each for each in Path(filesystem(tar)[1]).parents if each.exists())
                    device = folder.stat().st_dev
                    folders[device] = folder
                    needed[device] += header.samples * (sample + TAR_BYTES)
        if shown:
            total = format_bytes(samples * sample, 3)
            each = f"{format_bytes(sample, 3)} each, {total} in all"
            print(f"{encoder.outputs.kind}: {counted(samples, 'sample')} to encode, {each}", flush=True)
    for device, folder in folders.items():
        if needed[device] > (free := shutil.disk_usage(folder).free):
            raise RunError(
                f"{folder}: the cache needs {format_bytes(needed[device], 3)}, {format_bytes(free, 3)} are free; free"
                " space there, or encode fewer parts"
            )


class _Encoder:
    """Encodes shards for one kind of output."""

    def __init__(self, outputs: FrozenOutputs, dataset: Dataset, micro_batch: int, device: torch.device) -> None:
        self.outputs = outputs
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.device = device
        self.made = outputs.fingerprint()
        self.truncated = 0
        """Encoded captions whose end was not read."""
        self.name = latent_cache.digest(self.made)

    def tar(self, shard: str) -> str:
        """The cached tar of an original shard."""
        return latent_cache.cache_path(shard, self.outputs.kind, self.name, self.dataset.index_dir)

    def run(self, rank: int, ranks: int) -> str:
        """Encode shards `rank`, `rank` + `ranks`, …; returns a one-line summary."""
        done = kept = samples = bad = 0
        mine = range(rank, len(self.dataset.shards), ranks)
        for shard in track(mine, f"encoding {self.outputs.kind}", len(mine), "shards", shown=rank == 0):
            counts = self._encode(shard)
            kept, done = kept + (counts is None), done + (counts is not None)
            samples, bad = (total + more for total, more in zip((samples, bad), counts or (0, 0), strict=True))
        folder = posixpath.dirname(self.tar(self.dataset.shards[0]))
        notes = f", {counted(kept, 'shard')} already there" if kept else ""
        notes += f", {bad:,} {self.outputs.missing}" if bad else ""
        if self.truncated:
            notes += f", {counted(self.truncated, 'caption')} longer than the text model reads: the ends are lost"
        return f"rank {rank}: {folder}: {counted(samples, 'sample')} in {counted(done, 'shard')}{notes}"

    def _encode(self, number: int) -> tuple[int, int] | None:
        """Numbers of samples and of unreadable ones; None if the shard's cache is complete."""
        shard = self.dataset.shards[number]
        tar = self.tar(shard)
        header = latent_cache.read_header(tar)
        source = self.dataset.headers[number]
        whole = header and latent_cache.find_problem(source.sha256, tar, self.name) is None
        if whole and header and latent_cache.same_content(tar, header):
            return None
        write(f"{posixpath.dirname(tar)}/made.json", json.dumps(self.made, indent=2).encode())
        lines = latent_cache.index_path(tar)
        remove(lines)  # never an index next to a tar it does not describe
        entries: list[list] = []
        with staged(tar) as file:
            for left in file.parent.glob(f"{file.name}.tmp-*"):
                left.unlink()
            written = write_shard(file, self._members(number, entries))
            with file.open("rb") as opened:
                places = iter([(member.offset, member.size) for member in scan(TarInput(opened), read_all=False)])
        entries = [[key, *next(places), *check] if check else [key] for key, *check in entries]
        header = latent_cache.Header(
            latent_cache.VERSION, self.name, source.sha256, written.bytes, written.sha256, source.samples
        )
        text = [json.dumps(asdict(header)), *(json.dumps(entry) for entry in entries)]
        write(lines, ("\n".join(text) + "\n").encode())
        return source.samples, sum(len(entry) == 1 for entry in entries)

    def _members(self, shard: int, entries: list[list]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The tar's samples. Appends the key and checksum of each to `entries`, only the key if unreadable."""
        samples, step = self.dataset.headers[shard].samples, self.micro_batch
        member = f"{self.outputs.kind}.safetensors"
        with ThreadPoolExecutor() as pool:
            for start in range(0, samples, step):
                numbers = range(start, min(samples, start + step))
                read = list(pool.map(lambda number: self._read(shard, number), numbers))
                contents = iter(self._contents([value for _, value in read if value is not None]))
                for key, value in read:
                    entries.append([key])
                    if value is not None:
                        content = next(contents)
                        entries[-1].append(zlib.crc32(content))
                        yield key, {member: content}
        if self.outputs.empty:
            (content,) = self._encoded([""])
            entries.append(["", zlib.crc32(content)])
            yield EMPTY, {member: content}

    def _read(self, shard: int, number: int) -> tuple[str, Any]:
        """Key, and input of the frozen parts; None if unreadable."""
        key, _ = self.dataset.entry(shard, number)
        try:
            return key, self.outputs.read(self.dataset.read_any(shard, number))
        except DataError:
            raise
        except ValueError:  # training substitutes a neighbour
            return key, None

    def _contents(self, inputs: list[Any]) -> list[bytes]:
        """The same for up to a micro-batch of samples, those of one shape computed as a whole one: matrix products may
        round differently for another number of rows, and training has whole ones."""
        self.truncated += self.outputs.truncated(inputs) if inputs else 0
        alike: dict[Any, list[int]] = {}
        for place, one in enumerate(inputs):
            alike.setdefault(getattr(one, "shape", None), []).append(place)
        found: dict[int, bytes] = {}
        for places in alike.values():
            padded = [inputs[place] for place in (*places, *places[-1:] * (self.micro_batch - len(places)))]
            found.update(zip(places, self._encoded(padded), strict=False))
        return [found[place] for place in range(len(inputs))]

    def _encoded(self, inputs: list[Any]) -> list[bytes]:
        """A safetensors file for each of `inputs`."""
        found = self.outputs.encode(inputs, self.device)
        return [save({name: tensor.cpu().contiguous().clone() for name, tensor in one.items()}) for one in found]
