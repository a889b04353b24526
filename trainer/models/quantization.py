"""Quantized checkpoints: schemes that are dequantized exactly, and the names of refused ones.

A scheme is detected from the `quantization_config` in config.json and from the stored tensors; both must agree. Every
formula is the library's own, so that weights equal the library's bit for bit:

- compressed-tensors fp8 (`weight`, `weight_scale` [out, 1] or [1]): weight * scale in the scale's type
- bitsandbytes int8 (`weight`, `SCB` [out]): weight * SCB * (1 / 127) in fp32
- torchao int8 weight-only (`_weight_qdata`, `_weight_scale`, `_weight_zero_point`): (data - zero point) * scale in
  fp32, rounded to the weight's original type
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from .safetensors_files import StoredTensors

FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Types of unquantized weights."""
REMEDY = (
    "use unquantized (bf16) weights, or a model in compressed-tensors fp8, bitsandbytes int8 or torchao int8"
    " weight-only"
)

_COMPRESSED, _BITSANDBYTES, _TORCHAO = "compressed-tensors fp8", "bitsandbytes int8", "torchao int8 weight-only"

_METHODS = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "fp8": "block-wise fp8 (quant_method fp8)",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "svdquant": "SVDQuant",
}
"""`quant_method` -> display name; others are shown as they are."""

_TRACES = (
    (r"\.SCB|\.weight_format", _BITSANDBYTES),
    (r"\.absmax|\.nested_absmax|\.quant_map|\.quant_state\..+", "bitsandbytes nf4 or fp4"),
    (r"\._\w+_(qdata|scale|zero_point|scale_and_zero|per_tensor_scale|act_pre_scale)", "torchao"),
    (r"\.qzeros|\.g_idx|\.qweight|\.scales", "GPTQ or AWQ"),
    (r"\.weight_scale_inv", "block-wise fp8"),
    (r"\.weight_scale_2|\.weights_scaling_factor", "NVIDIA ModelOpt"),
    (r"\.(weight_packed|weight_scale|weight_zero_point|weight_global_scale|weight_g_idx)", "compressed-tensors or fp8"),
    (r"\.scale_weight|\.?scaled_fp8", "scaled fp8"),
    (r"\.W_q", "HQQ"),
    (r"\.weight\._(data|scale|shift)", "Quanto"),
    (r"\.wscales|\.smooth_factor", "SVDQuant"),
    (r"\.weight_scales", "EETQ"),
    (r"\.codebooks?|\.codes", "AQLM"),
    (r"_proj_(blocks|scales)", "MXFP4"),
)
"""Suffixes of tensor names that no unquantized checkpoint has, and their scheme."""

_ACTIVATIONS = re.compile(r".+\.(input|output|k|v|q)_(scale|zero_point)")
"""Scales of activations, which stay unquantized here, as in training with these libraries."""


@dataclass(frozen=True)
class Quantized:
    """One weight [out, in] stored as 8-bit numbers with scales, per row or per tensor."""

    data: str
    scale: str
    zero_point: str | None = None
    factor: float | None = None
    wide: bool = True
    """Whether the library computes in fp32 regardless of the scale's type."""
    rounded: torch.dtype | None = None
    """The type to which the library rounds the result."""

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for name in (self.data, self.scale, self.zero_point) if name)

    def flat(self, tensors: StoredTensors, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the flattened weight; reads only the rows that contain them."""
        scale = tensors.tensor(self.scale)
        if hi <= lo:
            return scale.new_empty(0)
        width = tensors.shape(self.data)[1]
        first, last = lo // width, -(-hi // width)
        rows = slice(first, last)
        scale = _select_rows(scale.float() if self.wide else scale, rows)
        values = tensors.flat(self.data, first * width, last * width).view(-1, width).to(scale.dtype)
        if self.zero_point:
            values = values - _select_rows(tensors.tensor(self.zero_point).to(scale.dtype), rows)
        values = values * scale
        if self.factor is not None:
            values = values * self.factor
        values = values.flatten()[lo - first * width : hi - first * width]
        return values.to(self.rounded) if self.rounded else values

    def symmetric(self, tensors: StoredTensors) -> bool:
        """Whether the weight is data times scale alone: there are no zero points, or all are 0."""
        return self.zero_point is None or not tensors.tensor(self.zero_point).any()

    def stored_rows(self, tensors: StoredTensors, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last) of the data, and the scale of each, fp32, for a symmetric weight."""
        width = tensors.shape(self.data)[1]
        values = tensors.flat(self.data, first * width, last * width).view(-1, width)
        scale = _select_rows(tensors.tensor(self.scale).float(), slice(first, last)).flatten()
        return values, (scale * (self.factor or 1.0)).expand(len(values))


def _select_rows(values: Tensor, rows: slice) -> Tensor:
    """[out, 1], [out], [1] or [] -> [rows, 1] or [1, 1]"""
    column = values.reshape(-1, 1)
    return column if len(column) == 1 else column[rows]


def quantized(tensors: StoredTensors, config: Mapping[str, Any], where: object) -> dict[str, Quantized]:
    """Quantized weights by name; empty for an unquantized checkpoint.

    config: the model's config.json. RunError names any scheme that cannot be read exactly.
    """
    schemes = {_scheme(settings, where) for settings in _settings(config)}
    if len(schemes) > 1:
        names = ", ".join(sorted(schemes))
        raise RunError(f"{where}: config.json names several quantization schemes ({names}); {REMEDY}")
    scheme = schemes.pop() if schemes else None
    found: dict[str, Quantized] = {}
    reader = _READERS[scheme](tensors, where) if scheme else None
    for name in tensors:
        if (trace := _trace(name)) is None:
            continue
        if scheme is None or reader is None:
            raise RunError(
                f"{where}: {name} belongs to weights quantized by {trace}, but config.json has no quantization_config;"
                f" {REMEDY}"
            )
        made = reader(name)
        if made is None:
            raise RunError(f"{where}: {name} does not belong to {scheme}, the scheme in config.json; {REMEDY}")
        weight, how = made
        if how is not None:
            found[weight] = _checked(tensors, weight, how, scheme, where)
    return found


def hidden(name: str) -> bool:
    """Whether a stored tensor is quantization metadata (of weights or activations) and not a weight."""
    return _trace(name) is not None or _ACTIVATIONS.fullmatch(name) is not None


def _trace(name: str) -> str | None:
    if _ACTIVATIONS.fullmatch(name):
        return None
    return next((scheme for ends, scheme in _TRACES if re.search(f"({ends})$", name)), None)


def _settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every quantization config in a config.json, including those of sub-models."""
    for key, value in config.items():
        if isinstance(value, dict):
            if key in ("quantization_config", "compression_config", "quantization"):
                if value:
                    yield value
            else:
                yield from _settings(value)


def _scheme(settings: Mapping[str, Any], where: object) -> str:
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
    if not method and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        kind = settings.get("bnb_4bit_quant_type", "4 bit")
        refused, scheme = None if settings.get("load_in_8bit") else f"bitsandbytes {kind}", _BITSANDBYTES
    elif method == "compressed-tensors" or (not method and "config_groups" in settings):
        refused, scheme = _compressed_refusal(settings), _COMPRESSED
    elif method == "torchao":
        refused, scheme = _torchao_refusal(settings), _TORCHAO
    else:
        refused, scheme = _METHODS.get(method, method or "an unnamed scheme"), ""
    if refused:
        raise RunError(f"{where}: weights are quantized by {refused}, which cannot be read exactly; {REMEDY}")
    return scheme


def _compressed_refusal(settings: Mapping[str, Any]) -> str | None:
    """What in a compressed-tensors config differs from fp8 per tensor or per channel."""
    for field in ("sparsity_config", "transform_config"):
        value = settings.get(field) or {}
        if value.get("format", "dense") != "dense" or value.get("config_groups"):
            return f"compressed-tensors with {field}"
    groups = settings.get("config_groups") or {}
    for name, group in groups.items():
        if not isinstance(group, dict):
            return f"compressed-tensors scheme {group}"
        weights = group.get("weights") or {}
        kind = f"{weights.get('type')}{weights.get('num_bits')}"
        strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(weights.get("group_size"), "group")
        storage = group.get("format") or settings.get("format")
        if (
            kind != "float8"
            or strategy not in ("tensor", "channel")
            or not weights.get("symmetric", True)
            or storage not in ("float-quantized", "naive-quantized")
        ):
            return f"compressed-tensors {kind} per {strategy}, {storage} ({name})"
    return None if groups else "compressed-tensors without config_groups"


def _torchao_refusal(settings: Mapping[str, Any]) -> str | None:
    kind = settings.get("quant_type")
    if isinstance(kind, dict):
        kind = (kind.get("default") or {}).get("_type")
    return None if kind == "Int8WeightOnlyConfig" else f"torchao {kind}"


def _torchao_metadata(tensors: StoredTensors) -> dict[str, dict[str, Any]]:
    """Header metadata of each weight that is not a plain tensor in a torchao file."""
    found: dict[str, dict[str, Any]] = {}
    for metadata in tensors.metadata():
        for name, text in metadata.items():
            try:
                about = json.loads(text)
            except ValueError:
                continue
            if isinstance(about, dict) and about.get("_type", "Tensor") != "Tensor":
                found[name] = about
    return found


_Found = tuple[str, Quantized | None]
"""A weight's name and how it is stored; None if another of its tensors determines that."""
_Reader = Callable[[str], _Found | None]
"""A tensor's name -> the weight it belongs to; None if the scheme has no such tensor."""


def _compressed(tensors: StoredTensors, where: object) -> _Reader:
    def read(name: str) -> _Found | None:
        weight = name.removesuffix("_scale")
        return (weight, Quantized(weight, name, wide=False)) if name.endswith(".weight_scale") else None

    return read


def _bitsandbytes(tensors: StoredTensors, where: object) -> _Reader:
    def read(name: str) -> _Found | None:
        module, _, end = name.rpartition(".")
        if end == "SCB":
            return f"{module}.weight", Quantized(f"{module}.weight", name, factor=7.874015718698502e-3)
        if end == "weight_format" and int(tensors.tensor(name)) == 0:  # row-major; other layouts are for old GPUs
            return f"{module}.weight", None
        return None

    return read


def _torchao(tensors: StoredTensors, where: object) -> _Reader:
    metadata = _torchao_metadata(tensors)
    for kind in {entry["_type"] for entry in metadata.values()} - {"Int8Tensor"}:
        raise RunError(f"{where}: contains a torchao {kind}, int8 weight-only has only Int8Tensor; {REMEDY}")
    # Names in the header may be those before a model was renamed, so all weights must have had one type.
    types = {(entry.get("_data") or {}).get("dtype", {}).get("_data") for entry in metadata.values()}
    rounded = getattr(torch, str(types.pop()), None) if len(types) == 1 else None
    if rounded not in FLOAT:
        raise RunError(f"{where}: the header lacks the original type of the weights; save the model again")

    def read(name: str) -> _Found | None:
        found = re.fullmatch(r"(.+)\._(\w+)_(qdata|scale|zero_point)", name)
        if found is None:
            return None
        module, weight, kind = found.groups()
        stem, zero_point = f"{module}._{weight}_", f"{module}._{weight}_zero_point"
        how = Quantized(name, f"{stem}scale", zero_point if zero_point in tensors else None, rounded=rounded)
        return f"{module}.{weight}", how if kind == "qdata" else None

    return read


_READERS = {_COMPRESSED: _compressed, _BITSANDBYTES: _bitsandbytes, _TORCHAO: _torchao}
_DATA = {_COMPRESSED: torch.float8_e4m3fn, _BITSANDBYTES: torch.int8, _TORCHAO: torch.int8}


def _checked(tensors: StoredTensors, weight: str, how: Quantized, scheme: str, where: object) -> Quantized:
    """RunError unless all tensors of a weight exist, with the types and shapes of the scheme."""
    if missing := [name for name in how.stored if name not in tensors]:
        raise RunError(f"{where}: {weight} is stored in {scheme}, but {missing[0]} is missing; fetch it again")
    shape, dtype = tensors.shape(how.data), tensors.dtype(how.data)
    rows = {tensors.shape(name) for name in how.stored[1:]}
    fits = len(shape) == 2 and rows <= {(shape[0], 1), (shape[0],), (1, 1), (1,), ()}
    if dtype != _DATA[scheme] or tensors.dtype(how.scale) not in FLOAT or not fits:
        found = ", ".join(f"{name} {tensors.dtype(name)} {list(tensors.shape(name))}" for name in how.stored)
        raise RunError(f"{where}: {weight} is not stored as {scheme} requires ({found}); {REMEDY}")
    return how
