"""Reading weights: safetensors files into modules, each rank its own slice and nothing more.

Under ZeRO-3 a parameter is flattened, padded and cut evenly over the ranks (`param.ds_tensor`). Every rank reads just
those bytes from the memory-mapped files: no gather, no broadcast, no rank ever holds a model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import RunError
from ..ranks import Gather, alone


class Source(Protocol):
    """Where weights come from: files of a model, or a checkpoint of a run."""

    def shape(self, name: str) -> tuple[int, ...] | None: ...

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened tensor."""
        ...


class WeightFiles:
    """The safetensors files of a model folder, or one file, read lazily."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = path / "model.safetensors.index.json"
        if path.is_file():
            files = [path]
        elif index.is_file():
            names = json.loads(index.read_text())["weight_map"].values()
            files = [path / name for name in sorted(set(names))]
        else:
            files = sorted(path.glob("*.safetensors"))
        if not files:
            raise RunError(f"{path}: no safetensors files there")
        self._files: dict[str, safe_open] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise RunError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def full(self, name: str) -> Tensor:
        """The tensor, memory-mapped: only what is touched is read."""
        return self._files[name].get_tensor(name)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        return self.full(name).flatten()[lo:hi]

    def content_hash(self, names: Iterable[str], rank: int = 0, ranks: int = 1, gather: Gather = alone) -> str:
        """sha256 over names, types, shapes and bytes of `names`; the work is spread over the ranks."""
        digests: dict[str, str] = {}
        for name in sorted(names)[rank::ranks]:
            tensor = self.full(name).contiguous()
            digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
            digests[name] = digest.hexdigest()
        merged = {name: value for part in gather(digests) for name, value in part.items()}
        return hashlib.sha256(json.dumps(sorted(merged.items())).encode()).hexdigest()


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

    RunError names the tensors that are missing or of another shape.
    """
    missing = [name for name in parameters if source.shape(name) is None]
    if missing:
        raise RunError(f"{where}: {len(missing)} tensors are missing, {', '.join(missing[:3])} …; is it complete?")
    for name, parameter in parameters.items():
        wanted, found = full_shape(parameter), source.shape(name)
        if wanted != found:
            raise RunError(f"{where}: {name} has shape {found}, this model needs {wanted}; another model's weights?")
        destination, lo, hi = local_slice(parameter)
        destination[hi - lo :].zero_()
        destination[: hi - lo].copy_(source.flat(name, lo, hi))


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
    return f"vision_language_model.model.{found['stem']}vision_branch_{found['rest']}"
