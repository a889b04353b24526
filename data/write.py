"""Write, index and verify shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from .atomic import commit, temporary_name
from .errors import DataError, DataLost, DataMissing
from .files import exists, is_local, require_writable
from .index import Header, Index, build_index, index_path, load_header, load_index, reindex, save_index, split_key
from .make_catalogue import catalogue_problems
from .progress import progress
from .shard_list import expand, folder_of
from .spread import Gather, from_first, shared, spread
from .transience import verdict

Sample = dict[str, bytes]
Result = TypeVar("Result")
THREADS = 8  # hashing and reading release the GIL


def preload() -> None:
    """Import the modules that writing needs, including torch, so that forked processes share them."""
    import webdataset.writer  # noqa: F401


def write_shard(path: str | os.PathLike, samples: Iterable[tuple[str, Sample]]) -> Header:
    """Write one local shard and then its index, each atomically.

    samples: (key, {extension: content}), for example ("cat", {"png": …, "txt": …}). Equal samples give equal bytes.
    """
    from webdataset.writer import TarWriter  # imports torch, which users of this module rarely need

    path = Path(path)
    if path.suffix != ".tar":
        raise DataError(f"{path}: a shard's name ends in .tar; rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(temporary_name(path))
    try:
        with open(temporary, "wb") as file, TarWriter(file, encoder=False, keep_meta=True, mtime=0) as tar:
            for key, members in samples:
                for kind in members:
                    if split_key(f"{key}.{kind}") != (key, kind):  # it would be read under another key
                        raise DataError(
                            f"{path}: key {key!r}, extension {kind!r}: a key ends at the first dot of its base name,"
                            " and extensions are lower-case; write a dot in a key as %2E"
                        )
                tar.write({"__key__": key, **members})
        index = build_index(str(temporary))
        Path(index_path(str(path))).unlink(missing_ok=True)  # an index must never be next to another tar than its own
        commit(str(temporary), path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # such as a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    save_index(str(path), index)
    return index.header


class Indexed(NamedTuple):
    """Result of indexing shards."""

    done: list[tuple[str, Header]]
    """Each shard with its header."""
    left_out: Counter[str]
    """Reason -> number of keys that are not samples."""
    problems: list[str]
    """One line per shard that could not be indexed."""


def index_all(
    spec: str | list[str],
    only_missing: bool = False,
    index_dir: str | None = None,
    rank: int = 0,
    gather: Gather = lambda value: [value],
    texts: bool = False,
) -> Indexed:
    """Index existing tars, without changing them; failures of single tars are collected. A remote tar is read once, in
    parts. index_dir: folder for the indexes; None: next to the tars. rank, gather: of the ranks that do this together;
    each indexes its share of the tars, and all return the same. texts: see `build_index`.

    Raises DataError, on all ranks, when a folder is not writable, before anything is read, or when a server refuses
    requests.
    """
    shards = from_first(lambda: expand(spec), rank, gather, None)
    if only_missing:  # agreed before any rank writes one
        indexed = spread(lambda shard: exists(index_path(shard, index_dir)), shards, rank, gather)
        shards = [shard for shard, has_one in zip(shards, indexed, strict=True) if not has_one]
    shared(lambda: _require_writable(shards, index_dir), gather)
    found = Indexed([], Counter(), [])
    work = _in_threads(partial(_index_one, index_dir, texts), shards, "indexing", rank, gather)
    for shard, (header, left_out, problem) in zip(shards, work, strict=True):
        if header is None:
            found.problems.append(problem)
            continue
        found.done.append((shard, header))
        found.left_out.update(left_out)
    return found


def _require_writable(shards: list[str], index_dir: str | None) -> None:
    for shard in {folder_of(shard): shard for shard in shards}.values():
        require_writable(index_path(shard, index_dir), "an index")


def _index_one(index_dir: str | None, texts: bool, shard: str) -> tuple[Header | None, Counter[str], str]:
    """The header of a shard that is now indexed, and the reasons of what is left out; or None and its problem."""
    try:
        index = build_index(shard, texts)
        if index.left_out and not index.header.samples:
            raise DataError(f"{shard}: {'no member ends in .txt or .json' if texts else _no_images(index)}")
        save_index(shard, index, index_dir)
    except DataLost:
        raise
    except DataError as error:
        if _refused(shard, error):
            raise
        return None, Counter(), str(error)
    return index.header, Counter(reason for _, reason in index.left_out), ""


def index_shards(
    spec: str | list[str], only_missing: bool = False, index_dir: str | None = None
) -> list[tuple[str, Header]]:
    """`index_all`, returning each shard with its header. Once all others are indexed, raises DataError with every shard
    that could not be indexed."""
    found = index_all(spec, only_missing, index_dir)
    if found.problems:
        raise DataError("\n".join(found.problems))
    return found.done


def _no_images(index: Index) -> str:
    kinds = Counter(reason for _, reason in index.left_out)
    longer = next((reason for reason in kinds if "its image is ." in reason), None)
    if longer:
        return (
            f"{longer}, but the trainer reads KEY.jpg, .jpeg, .png or .webp; make shards with `bifrost data ingest"
            " SRC OUT --image-column EXTENSION --caption-column EXTENSION`"
        )
    return "no member ends in .jpg, .jpeg, .png or .webp; name shards that hold images"


class Verified(NamedTuple):
    """Result of verifying shards."""

    checked: int
    problems: list[str]
    """One line per problem."""


def verify_all(
    spec: str | list[str], index_dir: str | None = None, rank: int = 0, gather: Gather = lambda value: [value]
) -> Verified:
    """Read every shard and compare it with its index, and the indexes with the catalogues of their folders. index_dir:
    folder of indexes and catalogues; None: next to the shards. rank, gather: of the ranks that do this together; each
    reads its share of the shards, and all return the same. Raises DataError, on all ranks, when the server of the
    shards refuses requests, DataLost when the storage is unavailable."""
    shards = from_first(lambda: expand(spec), rank, gather, None)
    found = _in_threads(partial(_check, index_dir), shards, "verifying", rank, gather)
    problems = [each for each in found if isinstance(each, str)]
    headers = {shard: each for shard, each in zip(shards, found, strict=True) if isinstance(each, Header)}
    problems += from_first(lambda: catalogue_problems(headers, index_dir), rank, gather, None)
    return Verified(len(shards), problems)


def verify(spec: str | list[str], index_dir: str | None = None) -> list[str]:
    """`verify_all`, returning its problems."""
    return verify_all(spec, index_dir).problems


def _in_threads(
    work: Callable[[str], Result], shards: list[str], label: str, rank: int, gather: Gather
) -> list[Result]:
    """Results of `work` on all shards, which the ranks divide, with the progress of the first on standard error."""
    mine = len(shards[rank :: len(gather(None))])
    with progress(label, mine, "shards", shown=rank == 0) as shown:

        def counted(shard: str) -> Result:
            result = work(shard)
            shown.advance()
            return result

        return spread(counted, shards, rank, gather, THREADS)


def _refused(shard: str, error: DataError) -> bool:
    """Whether a server refuses requests, for example without credentials, which affects all of its shards."""
    return not is_local(shard) and error.__cause__ is not None and verdict(error.__cause__) is False


def _has_texts(shard: str, index_dir: str | None) -> bool:
    """Whether the shard was indexed as texts; False without a usable index."""
    try:
        return load_header(shard, index_dir).texts
    except DataLost:
        raise
    except DataError:
        return False


def _check(index_dir: str | None, shard: str) -> Header | str:
    """The header of an intact shard, or its problem."""
    again = reindex(shard, index_dir)
    try:
        found = build_index(shard, _has_texts(shard, index_dir))
        stored = load_index(shard, index_dir=index_dir)
    except DataMissing:
        return f"{shard}: unindexed; run {again}"
    except DataLost:
        raise  # an unreachable shard is not a damaged one
    except DataError as error:
        if _refused(shard, error):
            raise
        return str(error)
    if found.header.bytes != stored.header.bytes:
        return (
            f"{shard}: altered ({found.header.bytes} bytes, indexed as {stored.header.bytes}); restore it, or run"
            f" {again} to accept it"
        )
    if found.header.sha256 != stored.header.sha256:
        return f"{shard}: altered (content hash); restore it, or run {again} to accept it"
    if found.header != stored.header or not found.same_entries(stored):
        return f"{index_path(shard, index_dir)}: altered index; run {again}"
    return stored.header
