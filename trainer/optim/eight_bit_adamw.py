"""AdamW whose moments are held in 8 bits, by torchao's functions, under ZeRO-3.

torchao quantizes blocks of 256 elements of a parameter by their largest magnitude. A slice may begin or end within a
block: the ranks that have a part of one agree on its magnitude, so that the moments are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from ..versions import import_hidden
from .eight_bit_slice import KINDS, Shared, Slice, cut_blocks
from .rules import BLOCK

LEAST = 1e-12
"""torchao's smallest scale."""


class EightBitAdamW(Optimizer):
    """AdamW that holds a parameter's moments in 8 bits if torchao does: if it has 4,096 elements or more, in whole
    blocks."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self._quant: Any = import_hidden("torchao.optim.quant_utils")
        self._adam: Any = import_hidden("torchao.optim.adam").single_param_adam
        self._codes: dict[str, Tensor] = {}  # kind -> the number of every code
        self._slices: dict[Tensor, list[Slice]] = {}
        self._of: dict[int, Slice] = {}  # by a parameter's ds_id
        self._cut: dict[Tensor, int] = {}  # blocks of a flat slice's parameters that several ranks have

    def create(self, flat: Tensor, parameters: Sequence[Any]) -> None:
        """Create the state of a flat slice of `parameters`, as before the first step."""
        if not self._codes:
            maps = {kind: self._quant.create_dynamic_map(kind == "exp_avg") for kind in KINDS}
            self._codes = {kind: torch.tensor(values, device=flat.device) for kind, values in maps.items()}
        self.state[flat] = {"step": torch.tensor(0.0)}
        self._slices[flat] = []
        start = places = 0
        for parameter in parameters:
            size, own = parameter.ds_numel, parameter.ds_tensor.ds_numel
            low = min(size, dist.get_rank() * own)
            one = Slice.of(size, low, min(size - low, own), start, flat)
            cut = cut_blocks(size, own)
            if one.scales:
                first = low // BLOCK
                have = range(first, first + len(one.scales[KINDS[0]]))
                one.shared = [Shared(block - first, places + at) for at, block in enumerate(cut) if block in have]
            places += len(cut)
            start += own
            self._slices[flat].append(one)
            self._of[parameter.ds_id] = one
        self._cut[flat] = places

    def slices(self) -> list[Slice]:
        """This rank's slices of all parameters."""
        return [one for slices in self._slices.values() for one in slices]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the flat slices that are in the groups; collective over all ranks."""
        for group in self.param_groups:
            for flat in group["params"]:
                self.state[flat]["step"] += 1

                def coming(one: Slice, kind: str, first: int, last: int, flat: Tensor = flat) -> Tensor:
                    gradient = _gradient(flat)[one.start :][one.within(first, last)]
                    goal = gradient if kind == "exp_avg" else gradient.square()
                    return self._values(one, kind, first, last).lerp(goal, 1 - group["betas"][KINDS.index(kind)])  # noqa: B023

                largest = self._agreed(flat, coming)
                for one in self._slices[flat]:
                    self._update(one, flat, group, largest)

    def moment(self, parameter: Any, kind: str) -> Tensor:
        """This rank's slice of a moment in fp32, without padding: a copy in host memory if it is held in 8 bits."""
        one = self._of[parameter.ds_id]
        if not one.scales:
            return one.moments[kind]
        values = torch.empty(one.length)
        for first, last in one.chunks():
            values[one.within(first, last)] = self._values(one, kind, first, last).cpu()
        return values

    @torch.no_grad()
    def adopt(self, moments: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Set the moments, by ds_id and kind, to values that `moment` returned on any number of ranks, to the bit;
        collective over all ranks. Those in fp32 are set already, as `moment` returned themselves."""
        given = {id(one): moments[number] for number, one in self._of.items() if one.scales}
        edge = -self._codes["exp_avg"][0]
        for flat, slices in self._slices.items():

            def stored(one: Slice, kind: str, first: int, last: int, flat: Tensor = flat) -> Tensor:
                return given[id(one)][kind][one.within(first, last)].to(flat.device)

            largest = self._agreed(flat, stored)
            for one in (one for one in slices if one.scales):
                for kind in KINDS:
                    for first, last in one.chunks():
                        values = F.pad(stored(one, kind, first, last), one.padding(first, last))
                        above, below = _magnitudes(one, kind, values, first, largest)
                        # The largest element has the code of 1, or, if it is negative, the lowest.
                        scale = torch.where(above > below, above, below / edge).clip(LEAST)
                        self._store(one, kind, values, scale, first)

    def _update(self, one: Slice, flat: Tensor, group: Mapping[str, Any], largest: Tensor | None) -> None:
        """Update masters and moments of a slice; largest: of `_agreed`."""
        if not one.scales:
            whole = slice(0, one.length)
            self._adamw(one, flat, whole, [one.moments[kind] for kind in KINDS], group)
            return
        edge = -self._codes["exp_avg"][0]
        for first, last in one.chunks():
            padding = one.padding(first, last)
            padded = [F.pad(self._values(one, kind, first, last), padding) for kind in KINDS]
            own = one.within(first, last)
            self._adamw(one, flat, own, [each[padding[0] :][: own.stop - own.start] for each in padded], group)
            for kind, values in zip(KINDS, padded, strict=True):
                above, below = _magnitudes(one, kind, values, first, largest)
                # Rounded so that `adopt` finds the same scale: torchao's, within the last bit.
                scale = torch.where(below > above, below * edge / edge, above).clip(LEAST)
                self._store(one, kind, values, scale, first)

    def _adamw(self, one: Slice, flat: Tensor, own: slice, moments: list[Tensor], group: Mapping[str, Any]) -> None:
        """torchao's AdamW on some elements of a slice, in place; moments: of these elements, in fp32."""
        weights, gradient = (each[one.start :][own] for each in (flat.detach(), _gradient(flat)))
        lr, (beta1, beta2) = torch.tensor(group["lr"]), group["betas"]
        step, decay, eps = self.state[flat]["step"], group["weight_decay"], group["eps"]
        self._adam(weights, gradient, step, *moments, None, lr, beta1, beta2, decay, eps, True, False)

    def _values(self, one: Slice, kind: str, first: int, last: int) -> Tensor:
        """Elements of a slice's moment in fp32, of these blocks."""
        front, back = one.padding(first, last)
        codes = F.pad(one.moments[kind][one.within(first, last)], (front, back))
        values = self._quant.dequant_with_qmap(codes, self._codes[kind], one.scales[kind][first:last])
        return values[front : len(values) - back]

    def _store(self, one: Slice, kind: str, values: Tensor, scale: Tensor, first: int) -> None:
        """Quantize `values` of whole blocks, the first of which has this number."""
        last = first + len(scale)
        front, back = one.padding(first, last)
        codes = self._quant.quantize_8bit_with_qmap(values.view(-1, BLOCK) / scale.view(-1, 1), self._codes[kind])
        one.moments[kind][one.within(first, last)] = codes.view(-1)[front : len(values) - back]
        one.scales[kind][first:last] = scale

    def _agreed(self, flat: Tensor, values: Callable[[Slice, str, int, int], Tensor]) -> Tensor | None:
        """The largest elements, and the largest negated ones, of the blocks that several ranks have: [kinds, 2,
        blocks]; None if there is none. values(slice, kind, first, last): of these blocks."""
        if not self._cut[flat]:
            return None
        largest = flat.new_zeros(len(KINDS), 2, self._cut[flat])
        for one in self._slices[flat]:
            for block, place in one.shared:
                for number, kind in enumerate(KINDS):
                    own = values(one, kind, block, block + 1)
                    largest[number, :, place] = torch.stack((own.amax(), -own.amin())).clip(0)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None
    return flat.grad


def _magnitudes(one: Slice, kind: str, values: Tensor, first: int, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest element of each block and the largest negated one, over all ranks. values: of whole blocks, the first
    of which has this number, zero where they are other ranks'; largest: of `_agreed`."""
    blocks = values.view(-1, BLOCK)
    above, below = blocks.amax(-1).clip(0), blocks.amin(-1).neg().clip(0)
    for block, place in one.shared:
        if largest is not None and first <= block < first + len(blocks):
            above[block - first], below[block - first] = largest[KINDS.index(kind), :, place]
    return above, below
