"""Loading weights from safetensors files into modules; each rank reads only its own slice.

ZeRO-3 flattens and pads each parameter and shards it evenly over the ranks (`param.ds_tensor`). Every rank reads just
those bytes: there is no gather or broadcast, and no rank ever holds the full model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..distributed.process_group import Gather, single_process
from ..errors import RunError
from .config_files import read_json
from .quantization import FLOAT, REMEDY, hidden, quantized
from .safetensors_files import StoredTensors, weight_files
from .unread import unread_neighbours

_HASHED = 1 << 23
"""Elements read and hashed per block."""


class Source(Protocol):
    """A source of weights: the files of a model, or a checkpoint of a run."""

    def shape(self, name: str) -> tuple[int, ...] | None: ...

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened tensor."""
        ...


class WeightFiles:
    """The weights of a model folder or of one safetensors file, read lazily.

    Quantized weights are dequantized when read; see `quantization`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = StoredTensors(weight_files(path))
        self._quantized = quantized(self._stored, _config(path), path)

    @property
    def names(self) -> list[str]:
        if not self._quantized:
            return sorted(self._stored)
        return sorted({name for name in self._stored if not hidden(name)} | self._quantized.keys())

    def shape(self, name: str) -> tuple[int, ...] | None:
        if how := self._quantized.get(name):
            return self._stored.shape(how.data)
        return self._stored.shape(name) if name in self._stored else None

    def dtype(self, name: str) -> torch.dtype | None:
        """The stored type; None for a quantized weight."""
        return None if name in self._quantized else self._stored.dtype(name)

    def full(self, name: str) -> Tensor:
        """The whole tensor, in memory."""
        if name in self._quantized:
            shape = self.shape(name)
            assert shape is not None
            return self.flat(name, 0, math.prod(shape)).view(shape)
        return self._stored.tensor(name)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        if how := self._quantized.get(name):
            return how.flat(self._stored, lo, hi)
        return self._stored.flat(name, lo, hi)

    def stored_rows(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor] | None:
        """Rows [first, last) of a quantized weight, as stored, and their scales [last - first], fp32. None for a weight
        that is plain or has zero points."""
        how = self._quantized.get(name)
        return how.stored_rows(self._stored, first, last) if how and how.symmetric(self._stored) else None

    def require(self, names: Iterable[str]) -> None:
        """RunError unless all `names` can be read as floats and no tensor next to them is unread."""
        names = list(names)
        missing = [name for name in names if self.shape(name) is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RunError(f"{self.path}: {missing[0]}{more} missing; fetch it again")
        for name in names:
            if name not in self._quantized and (dtype := self._stored.dtype(name)) not in FLOAT:
                raise _not_float(self.path, name, dtype)
        self.refuse_unread(names)

    def refuse_unread(self, names: Iterable[str]) -> None:
        """RunError if a stored tensor next to the weights `names` is not read by anything."""
        read = {part for name in names for part in (name, *self._parts(name))}
        if not (found := unread_neighbours(self._stored, read)):
            return
        name, weight = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(
            f"{self.path}: {name}{more} is stored next to {weight}, but nothing reads it. If it is a scale of quantized"
            f" weights: {REMEDY}; if an adapter: merge it into the weights; else these are another model's weights"
        )

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = single_process) -> str:
        """sha256 over names, types, shapes and stored bytes of `names`; the work is divided over the ranks."""
        stored = {part for name in names for part in self._parts(name)}
        digests: dict[str, str] = {}
        for name in sorted(stored)[rank::ranks]:
            shape = self._stored.shape(name)
            digest = hashlib.sha256(f"{name} {self._stored.dtype(name)} {shape}".encode())
            count = math.prod(shape)
            for lo in range(0, count, _HASHED):
                block = self._stored.flat(name, lo, min(lo + _HASHED, count))
                digest.update(block.view(torch.uint8).numpy().data)
            digests[name] = digest.hexdigest()
        merged = {name: value for part in gather(digests) for name, value in part.items()}
        return hashlib.sha256(json.dumps(sorted(merged.items())).encode()).hexdigest()

    def _parts(self, name: str) -> tuple[str, ...]:
        how = self._quantized.get(name)
        return how.stored if how else (name,)


def _config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder; empty if there is none."""
    file = path / "config.json"
    return read_json(file) if file.is_file() else {}


def _not_float(where: object, name: str, dtype: torch.dtype | None) -> RunError:
    kind = str(dtype).removeprefix("torch.") if dtype else "a type of fewer than 8 bits"
    return RunError(f"{where}: {name} is stored as {kind}, without scales to dequantize it; {REMEDY}")


class Distribution(NamedTuple):
    """Initial distribution: `normal` with standard deviation `scale`, `uniform` in +-scale, or `constant` at it."""

    shape: tuple[int, ...]
    kind: Literal["normal", "uniform", "constant"]
    scale: float


class RandomInit:
    """A source of initial weights: a function of seed and name, hence equal on any number of ranks."""

    def __init__(self, seed: int, tensors: Mapping[str, Distribution]) -> None:
        self.seed = seed
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        shape, kind, scale = self.tensors[name]
        if kind == "constant":
            return torch.full((hi - lo,), scale)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(shape, dtype=torch.float32)
        if kind == "normal":
            whole.normal_(std=scale, generator=generator)
        else:
            whole.uniform_(-scale, scale, generator=generator)
        return whole.flatten()[lo:hi]


def fill(parameters: Mapping[str, nn.Parameter], source: Source, where: object) -> None:
    """Fill every parameter, keyed by its name in `source`: this rank's slice, or all of it without ZeRO.

    RunError names tensors that are missing, have another shape, are not floats where the parameter is, or are stored
    next to them in a model's files without being read.
    """
    missing = [name for name in parameters if source.shape(name) is None]
    if missing:
        raise RunError(f"{where}: {len(missing)} tensors are missing, {', '.join(missing[:3])} …; is it complete?")
    if isinstance(source, WeightFiles):
        source.refuse_unread(parameters)
    for name, parameter in parameters.items():
        wanted, found = full_shape(parameter), source.shape(name)
        if wanted != found:
            raise RunError(f"{where}: {name} has shape {found}, expected {wanted}; are these another model's weights?")
        destination, lo, hi = local_slice(parameter)
        values = source.flat(name, lo, hi)
        if destination.is_floating_point() and values.dtype not in FLOAT:
            raise _not_float(where, name, values.dtype)
        destination[hi - lo :].zero_()
        destination[: hi - lo].copy_(values)


def local_slice(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """This rank's flat storage of a parameter, and the range of elements it contains.

    The storage may be longer than the range: the last ranks' slices are padded.
    """
    slice_: Tensor | None = getattr(parameter, "ds_tensor", None)
    if slice_ is None:
        return parameter.data.flatten(), 0, parameter.numel()
    rank: int = parameter.ds_zero_partition_rank  # type: ignore[attr-defined]
    total: int = parameter.ds_numel  # type: ignore[attr-defined]
    lo = min(rank * slice_.numel(), total)
    return slice_.data, lo, min(lo + slice_.numel(), total)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the full parameter, also when only a slice of it is on this rank."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def backbone_names(part: str, names: Iterable[str], files: WeightFiles) -> dict[str, str]:
    """Our parameter names of `text` or `vision` -> names in the files of a Qwen2.5-VL.

    Hub files use `model.layers…` and `visual…`; newer ones `model.language_model.layers…` and `model.visual…`; the
    public Bifrost-1 release prefixes the first form with `vision_language_model.`.
    """
    options = {
        "text": ("model.", "model.language_model.", "vision_language_model.model."),
        "vision": ("visual.", "model.visual.", "vision_language_model.visual."),
    }[part]
    names = list(names)
    prefix = next((p for p in options if files.shape(p + names[0]) is not None), options[0])
    return {name: prefix + name for name in names}


_COPIED = re.compile(r"branch\.(?P<stem>(layers\.\d+\.)?(self_attn\.)?)(?P<rest>.+)")
_PUBLIC_PREFIX = "vision_language_model."
_PUBLIC_NAMES = {
    "branch.mask_token": "mask_token",
    "branch.positions": "learnable_pos_emb",
    "head.weight": "vision_head.weight",
    "head.bias": "vision_head.bias",
}


def public_name(name: str) -> str:
    """A trainable parameter's name in the public checkpoint's layout.

    There the copies are stored among the frozen modules, with `vision_branch_` in the last module's name.
    """
    if name in _PUBLIC_NAMES:
        return _PUBLIC_NAMES[name]
    found = _COPIED.fullmatch(name)
    assert found, name
    return f"{_PUBLIC_PREFIX}model.{found['stem']}vision_branch_{found['rest']}"


def public_base_name(name: str) -> str:
    """A frozen tensor's name in the public checkpoint's layout, from any of the three layouts."""
    name = name.removeprefix(_PUBLIC_PREFIX)
    if is_trained(name):
        return name
    name = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    return _PUBLIC_PREFIX + name


def is_trained(name: str) -> bool:
    """Whether a name in the public layout belongs to the trained part."""
    return name in _PUBLIC_NAMES.values() or "vision_branch_" in name
