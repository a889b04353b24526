"""Reading weights: safetensors files into modules, each rank its own slice and nothing more.

Under ZeRO-3 a parameter is flattened, padded and cut evenly over the ranks (`param.ds_tensor`). Every rank reads just
those bytes from the files: no gather, no broadcast, no rank ever holds a model.
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

from ...data import DataError
from ...data.retry import call
from ..distributed.process_group import Gather, alone
from ..errors import RunError
from .quantization import FLOAT, REMEDY, hidden, quantized
from .safetensors_files import StoredTensors, weight_files
from .unread import unread_neighbours

_HASHED = 1 << 23
"""Elements read and hashed at a time."""


class Source(Protocol):
    """Where weights come from: files of a model, or a checkpoint of a run."""

    def shape(self, name: str) -> tuple[int, ...] | None: ...

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened tensor."""
        ...


class WeightFiles:
    """The weights of a model folder, or of one safetensors file, read lazily.

    Weights that are stored quantized are read as the floats that they stand for; see `quantization`.
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
        """As stored; None for a weight that is stored quantized and read as floats."""
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

    def require(self, names: Iterable[str]) -> None:
        """RunError unless all `names` are there as floats, or read as such, and nothing next to them is left over."""
        names = list(names)
        missing = [name for name in names if self.shape(name) is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise RunError(f"{self.path}: {missing[0]}{more} missing; fetch it again")
        for name in names:
            if name not in self._quantized and (dtype := self._stored.dtype(name)) not in FLOAT:
                raise _no_float(self.path, name, dtype)
        self.refuse_unread(names)

    def refuse_unread(self, names: Iterable[str]) -> None:
        """RunError for a stored tensor next to `names`, which are read, that nothing reads."""
        read = {part for name in names for part in (name, *self._parts(name))}
        if not (found := unread_neighbours(self._stored, read)):
            return
        name, weight = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(
            f"{self.path}: {name}{more} is stored next to {weight}, and nothing here reads it. A scale of quantized"
            f" weights: {REMEDY}; an adapter: merge it into the weights; else these are another model's weights"
        )

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = alone) -> str:
        """sha256 over names, types, shapes and bytes of `names` as stored; the work is spread over the ranks."""
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
    """The config.json of a model folder; empty where there is none."""
    file = path / "config.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a JSON file of a model; RunError unless it is an object."""
    try:
        found = json.loads(call(lambda: file.read_text(encoding="utf-8"), file))
    except DataError:  # of the storage
        raise
    except ValueError as error:
        raise RunError(f"{file}: is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise RunError(f"{file}: is no JSON object; fetch it again")
    return found


def _no_float(where: object, name: str, dtype: torch.dtype | None) -> RunError:
    kind = str(dtype).removeprefix("torch.") if dtype else "a type of fewer than 8 bits"
    return RunError(f"{where}: {name} is stored as {kind}, without the scales that make it a weight; {REMEDY}")


class Distribution(NamedTuple):
    """How a fresh tensor is drawn: `normal` with standard deviation `scale`, or `uniform` in +-scale."""

    shape: tuple[int, ...]
    kind: Literal["normal", "uniform"]
    scale: float


class Drawn:
    """Fresh weights as a source: a function of seed and name, so the same on any number of ranks."""

    def __init__(self, seed: int, tensors: Mapping[str, Distribution]) -> None:
        self.seed = seed
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.tensors[name].shape if name in self.tensors else None

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        shape, kind, scale = self.tensors[name]
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(shape, dtype=torch.float32)
        if kind == "normal":
            whole.normal_(std=scale, generator=generator)
        else:
            whole.uniform_(-scale, scale, generator=generator)
        return whole.flatten()[lo:hi]


def fill(parameters: Mapping[str, nn.Parameter], source: Source, where: object) -> None:
    """Set every parameter, named as in `source`, from it: this rank's slice, or all of it without ZeRO.

    RunError names the tensors that are missing, of another shape, no floats where the parameter is one, or stored next
    to those in a model's files and not read.
    """
    missing = [name for name in parameters if source.shape(name) is None]
    if missing:
        raise RunError(f"{where}: {len(missing)} tensors are missing, {', '.join(missing[:3])} …; is it complete?")
    if isinstance(source, WeightFiles):
        source.refuse_unread(parameters)
    for name, parameter in parameters.items():
        wanted, found = full_shape(parameter), source.shape(name)
        if wanted != found:
            raise RunError(f"{where}: {name} has shape {found}, this model needs {wanted}; another model's weights?")
        destination, lo, hi = local_slice(parameter)
        values = source.flat(name, lo, hi)
        if destination.is_floating_point() and values.dtype not in FLOAT:
            raise _no_float(where, name, values.dtype)
        destination[hi - lo :].zero_()
        destination[: hi - lo].copy_(values)


def local_slice(parameter: nn.Parameter) -> tuple[Tensor, int, int]:
    """This rank's flat storage of a parameter, and the range of its elements that lies there.

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
    """Shape of the whole parameter, also where only a slice of it is here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def backbone_names(part: str, names: Iterable[str], files: WeightFiles) -> dict[str, str]:
    """Our parameter names of `text` or `vision` -> names in a Qwen2.5-VL's files.

    Hub files say `model.layers…` and `visual…`; newer ones `model.language_model.layers…` and `model.visual…`; the
    public Bifrost-1 release puts `vision_language_model.` before the first form.
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

    There the copies live among the frozen modules, told apart by `vision_branch_` in the last module's name.
    """
    if name in _PUBLIC_NAMES:
        return _PUBLIC_NAMES[name]
    found = _COPIED.fullmatch(name)
    assert found, name
    return f"{_PUBLIC_PREFIX}model.{found['stem']}vision_branch_{found['rest']}"


def public_base_name(name: str) -> str:
    """A frozen tensor's name in the public checkpoint's layout, from that of a hub's file, old or new, or that one."""
    name = name.removeprefix(_PUBLIC_PREFIX)
    if is_trained(name):
        return name
    name = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    return _PUBLIC_PREFIX + name


def is_trained(name: str) -> bool:
    """Whether a name of the public layout is of the trained part."""
    return name in _PUBLIC_NAMES.values() or "vision_branch_" in name
