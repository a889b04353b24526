"""Writing shards, checking them, and indexing tars that others wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from .errors import DataError, DataLost, DataMissing
from .files import commit, exists, temporary_name
from .index import Header, build_index, index_path, load_index, save_index
from .shards import expand

Sample = dict[str, bytes]
Result = TypeVar("Result")
THREADS = 8  # hashing and reading release the interpreter's lock


def preload() -> None:
    """Import what writing needs, torch behind it, so that processes forked afterwards share it."""
    import webdataset.writer  # noqa: F401


def write_shard(path: str | os.PathLike, samples: Iterable[tuple[str, Sample]]) -> Header:
    """Write one local shard and its index; each appears under its name only when complete, the index last.

    samples: (key, {extension: content}), for example ("cat", {"png": …, "txt": …}). Equal samples give equal bytes.
    """
    from webdataset.writer import TarWriter  # imports torch, which readers of this module rarely need

    path = Path(path)
    if path.suffix != ".tar":
        raise DataError(f"{path}: a shard's name ends in .tar; rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(temporary_name(path))
    try:
        with open(temporary, "wb") as file, TarWriter(file, encoder=False, keep_meta=True, mtime=0) as tar:
            for key, members in samples:
                tar.write({"__key__": key, **members})
        index = build_index(str(temporary))
        Path(index_path(str(path))).unlink(missing_ok=True)  # never an index beside another tar than its own
        commit(str(temporary), path)
    finally:
        temporary.unlink(missing_ok=True)
    save_index(str(path), index)
    return index.header


def index_shards(spec: str | list[str], only_missing: bool = False) -> list[tuple[str, Header]]:
    """Index existing tars, beside them, without touching them; returns each shard with its header."""
    shards = expand(spec)
    if only_missing:
        shards = [shard for shard in shards if not exists(index_path(shard))]

    def index_one(shard: str) -> tuple[str, Header]:
        index = build_index(shard)
        if not index.header.samples:
            raise DataError(f"{shard}: no member ends in .jpg, .jpeg, .png or .webp; name shards that hold images")
        save_index(shard, index)
        return shard, index.header

    return list(_in_threads(index_one, shards, "indexing"))


def verify(spec: str | list[str]) -> list[str]:
    """Read every shard and compare it with its index; one line a problem, none when all is well."""
    return [problem for problem in _in_threads(_check, expand(spec), "verifying") if problem]


def _in_threads(work: Callable[[str], Result], shards: list[str], label: str) -> Iterator[Result]:
    """Results of `work` in the shards' order; a terminal sees the progress."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(work, shards)
        yield from track(results, label, len(shards), console=console, disable=not console.is_terminal)


def _check(shard: str) -> str | None:
    try:
        found = build_index(shard)
        stored = load_index(shard)
    except DataMissing:
        return f"{shard}: unindexed; run `bifrost data index {shard}`"
    except DataLost:
        raise  # a shard that cannot be reached is no damaged shard
    except DataError as error:
        return str(error)
    if found.header.bytes != stored.header.bytes:
        return (
            f"{shard}: altered ({found.header.bytes} bytes, indexed as {stored.header.bytes}); restore it, or run"
            f" `bifrost data index {shard}` to accept it"
        )
    if found.header.sha256 != stored.header.sha256:
        return f"{shard}: altered (content hash); restore it, or run `bifrost data index {shard}` to accept it"
    if found != stored:
        return f"{index_path(shard)}: altered index; run `bifrost data index {shard}`"
    return None
