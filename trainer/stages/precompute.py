"""`bifrost data encode`: store the outputs of frozen parts for every sample, for `flux.placement` cached.

Rank r takes shards r, r + size, … independently of other ranks; `stages/latent_cache.py` describes the files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save

from ...data import DataError, Dataset, open_dataset
from ...data.atomic import write_atomic
from ...data.files import is_local
from ...data.index import load_header
from ...data.progress import track
from ...data.tars import TarInput, scan
from ...data.transforms import decode_image
from ...data.units import counted
from ...data.write import write_shard
from ..errors import RunError
from ..models.flux import PARTS, FluxTokenizers, Tokens
from . import latent_cache
from .controlnet import ControlNetStage
from .placement import PlacedFlux
from .unsharded import init_context

EMPTY = "__empty__"
"""Key of the empty caption in a text cache."""


def encode(stage: ControlNetStage, held_out: str | list[str] | None, micro_batch: int) -> int:
    """Encode this rank's shards for the stage's cached parts, skipping complete ones. Returns 0. held_out: shards to
    encode in addition to the training data; micro_batch: samples encoded at a time.

    RunError and DataError name what cannot be used.
    """
    rank, ranks, local = (int(os.environ.get(*d)) for d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    named = [[spec] if isinstance(spec, str) else spec for spec in (stage.data.shards, held_out or [])]
    dataset = open_dataset([shard for spec in named for shard in spec])
    if remote := [shard for shard in dataset.shards if not is_local(shard)]:
        raise RunError(f"{remote[0]}: a cache is written next to its shards, which must be local")
    for kind in stage.flux.placement.cached:
        encoder = _Encoder(kind, stage, dataset, micro_batch, device)
        try:
            print(encoder.run(rank, ranks), flush=True)
        except (RunError, DataError) as error:  # specific to this rank's shards, so name the rank
            raise RunError(f"rank {rank}: {error}") from error
    return 0


class _Encoder:
    """Encodes shards of one kind; the frozen parts are loaded when the first shard needs them."""

    def __init__(
        self,
        kind: latent_cache.Kind,
        stage: ControlNetStage,
        dataset: Dataset,
        micro_batch: int,
        device: torch.device,
    ) -> None:
        self.kind: latent_cache.Kind = kind
        self.stage = stage
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.device = device
        self.made = stage.cache_fingerprint(kind)
        self.name = latent_cache.digest(self.made)
        self._flux: PlacedFlux | None = None

    def run(self, rank: int, ranks: int) -> str:
        """Encode shards `rank`, `rank` + `ranks`, …; returns a one-line summary."""
        done = kept = samples = bad = 0
        mine = range(rank, len(self.dataset.shards), ranks)
        for shard in track(mine, f"encoding {self.kind}", len(mine), "shards", shown=rank == 0):
            counts = self._encode(shard)
            kept, done = kept + (counts is None), done + (counts is not None)
            samples, bad = (total + more for total, more in zip((samples, bad), counts or (0, 0), strict=True))
        folder = Path(latent_cache.cache_path(self.dataset.shards[0], self.kind, self.name)).parent
        notes = (f", {counted(kept, 'shard')} already there" if kept else "") + (f", {bad:,} unreadable" if bad else "")
        return f"rank {rank}: {folder}: {counted(samples, 'sample')} in {counted(done, 'shard')}{notes}"

    def _encode(self, number: int) -> tuple[int, int] | None:
        """Numbers of samples and of unreadable ones; None if the shard's cache is complete."""
        shard = self.dataset.shards[number]
        tar = Path(latent_cache.cache_path(shard, self.kind, self.name))
        header = latent_cache.read_header(str(tar))
        whole = header and latent_cache.find_problem(shard, str(tar), self.name) is None
        if whole and header and latent_cache.same_content(str(tar), header):
            return None
        tar.parent.mkdir(exist_ok=True)
        write_atomic(tar.with_name("made.json"), json.dumps(self.made, indent=2).encode())
        lines = Path(latent_cache.index_path(str(tar)))
        lines.unlink(missing_ok=True)  # never an index next to a tar it does not describe
        for left in tar.parent.glob(f"{tar.name}.tmp-*"):
            left.unlink()
        entries: list[list] = []
        written = write_shard(tar, self._members(number, entries))
        with tar.open("rb") as file:
            places = iter([(member.offset, member.size) for member in scan(TarInput(file), read_all=False)])
        entries = [[key, *next(places), *check] if check else [key] for key, *check in entries]
        samples = self.dataset.headers[number].samples
        header = latent_cache.Header(
            latent_cache.VERSION, self.name, load_header(shard).sha256, written.bytes, written.sha256, samples
        )
        text = [json.dumps(asdict(header)), *(json.dumps(entry) for entry in entries)]
        write_atomic(lines, ("\n".join(text) + "\n").encode())
        return samples, sum(len(entry) == 1 for entry in entries)

    def _members(self, shard: int, entries: list[list]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The tar's samples. Appends the key and checksum of each to `entries`, only the key if unreadable."""
        samples, step = self.dataset.headers[shard].samples, self.micro_batch
        member = f"{self.kind}.safetensors"
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
        if self.kind == "text":
            (content,) = self._contents([""])
            entries.append(["", zlib.crc32(content)])
            yield EMPTY, {member: content}

    def _read(self, shard: int, number: int) -> tuple[str, object]:
        """Key, and pixels [3, P, P] or caption; None if unreadable."""
        key, _ = self.dataset.entry(shard, number)
        try:
            raw = self.dataset.read(shard, number)
            if self.kind == "text":
                return key, raw.caption
            return key, torch.from_numpy(decode_image(raw.image, self.stage.flux.image_size).copy()).permute(2, 0, 1)
        except DataError:
            raise
        except ValueError:  # training substitutes a neighbour
            return key, None

    def _contents(self, values: list) -> list[bytes]:
        """A safetensors file for each of `values`, pixels [3, P, P] or captions."""
        if not values:
            return []
        flux = self._flux or self._load()
        if self.kind == "vae":
            found = flux.posterior(torch.stack(values).to(self.device))
            names = "mean", "std"
        else:
            tokens = FluxTokenizers(flux.folder)(values)
            found = flux.encode_text(Tokens(tokens.t5.to(self.device), tokens.clip.to(self.device)))
            names = "text", "pooled"
        rows = zip(*(tensor.cpu() for tensor in found), strict=True)
        return [save({name: t.contiguous().clone() for name, t in zip(names, row, strict=True)}) for row in rows]

    def _load(self) -> PlacedFlux:
        needed = latent_cache.PARTS[self.kind]
        dtype = torch.float32 if self.stage.precision == "fp32" else torch.bfloat16
        with init_context(self.device, dtype):
            flux = PlacedFlux(self.stage.folder, {p: "sharded" if p in needed else "cached" for p in PARTS})
        flux.load()
        self._flux = flux
        return flux
