"""Reading the weights of 8-bit linear layers: as stored, if the files have them in the same 8 bits, else quantized."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...recipes.fields import HeldWeights
from ..errors import RunError
from .eight_bits import STORED, EightBits, quantized, scales
from .weights import Source, WeightFiles

log = logging.getLogger(__name__)


def frozen_source(
    module: nn.Module, names: Mapping[str, str], files: WeightFiles, held: HeldWeights
) -> tuple[dict[str, str], Source]:
    """Where `module`'s parameters are read from: names of parameters -> names in the source, and the source.

    names: of all parameters but the scales -> names in `files`. RunError names what cannot be held in 8 bits.
    """
    of_weight = scales(module)
    if not of_weight:
        return dict(names), files
    assert held != "bf16"
    files.require(names.values())
    stored = {scale: names[weight] for scale, weight in of_weight.items()}
    return {**names, **{scale: scale for scale in stored}}, EightBitSource(files, held, stored)


class EightBitSource:
    """`Source` of a model's weights, those of some linear layers in 8 bits.

    scales: name of each scale -> name of its weight in `files`. A row is quantized by itself, so that values depend
    neither on the number of ranks nor on what else is read.
    """

    def __init__(self, files: WeightFiles, kind: EightBits, scales: Mapping[str, str]) -> None:
        self.files = files
        self.kind: EightBits = kind
        self._scales = scales
        self._weights = frozenset(scales.values())
        self._last: tuple[tuple[str, int, int], tuple[Tensor, Tensor]] | None = None
        self._warned = False

    def shape(self, name: str) -> tuple[int, ...] | None:
        if weight := self._scales.get(name):
            shape = self.files.shape(weight)
            return shape[:1] if shape else None
        return self.files.shape(name)

    def flat(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of a flattened tensor: bits of a scale, 8-bit values, or plain weights."""
        if weight := self._scales.get(name):
            return self._rows(weight, lo, hi)[1].view(torch.int32)
        if name not in self._weights:
            return self.files.flat(name, lo, hi)
        width = self._width(name)
        first, last = lo // width, -(-hi // width)
        return self._rows(name, first, last)[0].flatten()[lo - first * width : hi - first * width]

    def _rows(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows [first, last) of a weight in 8 bits, and their scales. The latest are kept: scale and weight are read
        one after the other."""
        key = name, first, last
        if self._last is None or self._last[0] != key:
            self._last = key, self._read(*key)
        return self._last[1]

    def _read(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        if last <= first:
            return torch.empty(0, self._width(name), dtype=STORED[self.kind]), torch.empty(0)
        if (found := self.files.stored_rows(name, first, last)) is not None:
            values, scale = found
            if self.kind == ("int8" if values.dtype == torch.int8 else "fp8"):
                return values.view(STORED[self.kind]), scale
            self._warn(values.dtype)
        width = self._width(name)
        rows = self.files.flat(name, first * width, last * width).view(-1, width)
        if not rows.isfinite().all():
            raise RunError(f"{self.files.path}: {name} has values that are not finite, which 8 bits cannot represent")
        return quantized(rows, self.kind)

    def _width(self, name: str) -> int:
        shape = self.files.shape(name)
        assert shape is not None and len(shape) == 2, name
        return shape[1]

    def _warn(self, dtype: torch.dtype) -> None:
        if not self._warned:
            kind = str(dtype).removeprefix("torch.")
            log.warning("%s: weights stored in %s are quantized again, to %s", self.files.path, kind, self.kind)
        self._warned = True
