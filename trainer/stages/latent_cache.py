"""Outputs of frozen parts for every sample, stored with the shards' indexes and read instead of recomputed.

Next to `train-00000.tar`, or to its index in `data.index_dir`, is a folder `cache-vae-0123abcd` with the same shards,
named after its fingerprint (`made.json`): its `train-00000.tar` contains `KEY.vae.safetensors` in the order of the
original samples, in the precision in which they were computed. `train-00000.cache.jsonl` in that folder has a header
(`Header`), then a line per sample: `["KEY", offset, size, crc32]`, or `["KEY"]` for an unreadable sample. A text cache
has one more line with the key "", for the empty caption.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import load
from torch import Tensor

from ...data import DataError, DataMissing, Dataset, RawSample
from ...data.files import STREAM_BLOCK, File, OpenShards, Stream, content, open_file
from ...data.index import CAPTION_TYPE, HEADER_LIMIT
from ...data.index_dir import place_of
from ...data.mixture import MOST_OPEN
from ...data.remote import filesystem, size_of
from ...data.retry import call
from ...data.spread import Broadcast, spread
from ...recipes.schema import Data
from ..distributed.process_group import Gather, single_process
from ..errors import RunError
from .training_data import open_training_data

Kind = Literal["vae", "text", "vision", "predicted"]
VERSION = 1
REENCODE_HINT = "run `bifrost data encode` with this recipe"


@dataclass(frozen=True)
class Header:
    """Header of one shard of a cache."""

    version: int
    made: str
    """Hash of the cache fingerprint."""
    source: str
    """Content hash of the original shard."""
    bytes: int
    """Size of the cached tar."""
    sha256: str
    """Content hash of the cached tar."""
    samples: int
    """Samples of the original shard."""


def digest(made: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def cache_path(shard: str, kind: Kind, made: str, index_dir: str | None = None) -> str:
    """The cached tar of an original shard; made: the digest of the fingerprint; index_dir: folder of the indexes."""
    folder, name = posixpath.split(place_of(shard, index_dir))
    return posixpath.join(folder, f"cache-{kind}-{made[:8]}", name)


def index_path(tar: str) -> str:
    return tar.removesuffix(".tar") + ".cache.jsonl"


def read_header(tar: str) -> Header | None:
    """The header of a cached shard; None if it is missing or does not parse."""
    try:
        found = content(index_path(tar), HEADER_LIMIT)
    except DataMissing:
        return None
    try:
        return Header(**json.loads(found.partition(b"\n")[0]))
    except (ValueError, TypeError):
        return None


def find_problem(source: str, tar: str, made: str) -> str | None:
    """Why the cached `tar` of an original shard is unusable, by header and size; None if it is usable. source: the
    original shard's content hash."""
    header = read_header(tar)
    if header is None:
        return "missing"
    try:
        size = call(lambda: size_of(tar), tar)
    except DataMissing:
        return "missing"
    if header.made != made:
        return "made with other weights or settings than its folder name states"
    if header.source != source:
        return f"made from another {posixpath.basename(tar)}"
    if size != header.bytes:
        return f"damaged ({size} bytes instead of {header.bytes})"
    return None


class FrozenOutputs(Protocol):
    """The outputs of frozen parts of one kind, to be cached; the parts are loaded by the first `encode`."""

    kind: Kind
    setting: str
    """The setting and value that read this cache, for errors."""
    empty: bool
    """Whether the output for the empty caption is stored too."""
    missing: str
    """What samples without an output are."""

    def fingerprint(self, rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> dict[str, Any]:
        """Everything except the data that determines the content of a cache; `ranks` divide the hashing."""
        ...

    @property
    def sample_bytes(self) -> int:
        """Bytes of a sample's tensors."""
        ...

    def read(self, sample: RawSample) -> Any:
        """Input of a sample for `encode`. Raises ValueError if it is unreadable, as in training."""
        ...

    def truncated(self, inputs: list[Any]) -> int:
        """How many of `inputs` have a caption whose end is not read."""
        ...

    def encode(self, inputs: list[Any], device: torch.device) -> list[dict[str, Tensor]]:
        """The tensors of each of `inputs`, computed on `device`, all with the same `shape` if they have one; where
        `empty` is set, "" is an input too."""
        ...


class FrozenWeights(Protocol):
    """Stored weights that a run uses and does not train."""

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> str:
        """Hash of the weights `names`; the work is divided over the ranks, all of which call it."""
        ...


class Predictor(FrozenOutputs, Protocol):
    """The patch latents that stage 1 predicts, [N, D] under the name `latents`."""

    def frozen(self) -> list[tuple[FrozenWeights, list[str]]]:
        """The weights of stage 1, and the names of those used."""
        ...


def open_caches(
    outputs: Sequence[FrozenOutputs],
    data: Data,
    rank: int = 0,
    ranks: int = 1,
    gather: Gather = single_process,
    broadcast: Broadcast | None = None,
) -> dict[Kind, Cache]:
    """The cache of each of `outputs` for a data set; each rank checks its share.

    RunError if one is missing, incomplete, or made with other settings or from other shards.
    """
    if not outputs:
        return {}
    require_one_caption(outputs, data)
    dataset = open_training_data(data, 0, rank, gather, broadcast)
    most_open = max(64, 2 * data.shuffle_window, min(MOST_OPEN, 2 * data.shuffle_window * len(data.trained)))
    return {one.kind: _open_cache(one, dataset, most_open, rank, ranks, gather) for one in outputs}


def require_one_caption(outputs: Sequence[FrozenOutputs], data: Data) -> None:
    """RunError when `data` chooses among captions that one of `outputs` is computed from."""
    of_caption = next((one for one in outputs if one.kind in ("text", "predicted")), None)
    if of_caption is not None and data.caption_members != {CAPTION_TYPE}:
        raise RunError(
            f"{of_caption.setting}: a cache has one output per sample, that of KEY.txt, but captions are read from"
            f" {', '.join(sorted(data.caption_members))}; leave out the captions of data, or do not cache what depends"
            " on them"
        )


def _open_cache(
    outputs: FrozenOutputs, dataset: Dataset, most_open: int, rank: int, ranks: int, gather: Gather
) -> Cache:
    kind, made = outputs.kind, outputs.fingerprint(rank, ranks, gather)
    shards, name = dataset.shards, digest(made)
    tars = [cache_path(shard, kind, name, dataset.index_dir) for shard in shards]
    pairs = [(header.sha256, tar) for header, tar in zip(dataset.headers, tars, strict=True)]
    found = spread(lambda pair: find_problem(*pair, name), pairs, rank, gather)
    problems = [(tar, problem) for tar, problem in zip(tars, found, strict=True) if problem]
    if not problems:
        return Cache(tars, max_open=most_open)
    setting, (tar, problem) = outputs.setting, problems[0]
    if len(problems) == len(tars) and {problem for _, problem in problems} == {"missing"}:
        if other := _difference(place_of(shards[0], dataset.index_dir), kind, made):
            raise RunError(f"{setting}: {other}; {REENCODE_HINT}")
        raise RunError(f"{setting}: {posixpath.dirname(tar)} is missing; {REENCODE_HINT}")
    more = f" ({len(problems)} of {len(tars)} shards are unusable)" if len(tars) > 1 else ""
    raise RunError(f"{setting}: {tar}: {problem}{more}; {REENCODE_HINT}")


def _difference(shard: str, kind: Kind, made: dict[str, Any]) -> str | None:
    """How another cache next to `shard`, or to its index, differs from the required one."""
    fs, folder = filesystem(posixpath.dirname(shard) or ".")
    for file in sorted(call(lambda: fs.glob(f"{folder}/cache-{kind}-*/made.json"), shard)):
        theirs = json.loads(call(partial(fs.cat_file, file), file))
        fields = [name for name in made if theirs.get(name) != made[name]]
        if fields:
            values = [f"{name} {_short(theirs.get(name))}, here {_short(made[name])}" for name in fields]
            return f"{posixpath.dirname(str(file))}: made with another {'; '.join(values)}"
    return None


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class _Shard:
    lines: list[bytes]
    file: File


class Cache:
    """Cached tensors of one kind, read sample by sample; every read is verified."""

    def __init__(self, tars: Sequence[str], max_open: int = 64) -> None:
        self.tars = list(tars)
        self.opened = OpenShards(self.tars, self._open, max_open)

    def read(self, origin: tuple[int, int], key: str) -> dict[str, Tensor]:
        """Tensors of sample number `origin[1]` of shard `origin[0]`, whose key must be `key`."""
        return self._read(*origin, key)

    def empty(self, shard: int) -> dict[str, Tensor]:
        """Tensors of the empty caption, from `shard`."""
        return self._read(shard, -1, "")

    def _read(self, shard: int, line: int, key: str) -> dict[str, Tensor]:
        try:
            found, *place = json.loads(self.opened.read(shard, lambda opened: opened.lines[line]))
            if found == key:
                offset, size, check = place
                content = self.opened.read(shard, lambda opened: opened.file.read(offset, size))
                if zlib.crc32(content) == check:
                    return load(content)
        except DataError:
            raise
        except (ValueError, IndexError):
            pass
        what = f"sample {key}" if key else "the empty caption"
        raise DataError(f"{self.tars[shard]}: damaged or incomplete at {what}; {REENCODE_HINT}")

    def _open(self, shard: int) -> _Shard:
        tar = self.tars[shard]
        return _Shard(content(index_path(tar)).splitlines()[1:], open_file(tar))


def same_content(tar: str, header: Header) -> bool:
    """Whether a tar, read in full, matches its header."""
    digest = hashlib.sha256()
    with Stream(tar) as file:
        while part := file.read(STREAM_BLOCK):
            digest.update(part)
    return digest.hexdigest() == header.sha256
