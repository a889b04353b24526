"""Bytes over the wire in one step, by kind, and the collectives that carry them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...recipes import Recipe
from ..flops import Part
from .layout import Layout, Zero, small


@dataclass(frozen=True)
class Transfer:
    """One kind of transfer in a step: bytes that a GPU receives, in `count` collectives over `ranks` GPUs.

    hidden: it is issued ahead, so that it can run beside computation.
    """

    kind: str
    bytes: float
    count: int
    ranks: int
    scope: Literal["all", "node"]
    hidden: bool


def traffic(parts: Sequence[Part], recipe: Recipe, layout: Layout, gpus: int, node: int, passes: int) -> list[Transfer]:
    """Of a step with `passes` backward passes; nothing on one GPU."""
    zero = Zero.of(recipe).under(layout)
    node = min(node, gpus)
    found: list[Transfer] = []

    def add(kind: str, sizes: Iterable[int], times: int, width: int, bucket: int, local: bool, hidden: bool) -> None:
        sizes, ranks = list(sizes), node if local else gpus
        elements = sum(sizes)
        if not elements or not times or ranks == 1:
            return
        received = float(times * width * elements) * (ranks - 1) / ranks
        scope = "node" if local else "all"
        found.append(Transfer(kind, received, times * buckets(sizes, bucket), ranks, scope, hidden))

    ahead = zero.prefetch_bucket > 0

    def gather(kind: str, part: Part, times: int, local: bool) -> None:
        large = [size for size in part.parameters if size > zero.persistent]
        add(kind, large, times, zero.weight_bytes, zero.prefetch_bucket, local, ahead)

    for part in layout.place(parts):
        trained = part.gradient == "trained"
        if trained:
            # With hpZ the second copy is cut anew from the first gather after every update.
            gather("gather trained, forward", part, 1 if layout.hpz else passes, False)
            gather("gather trained, forward", part, passes - 1 if layout.hpz else 0, True)
            gather("gather trained, backward", part, passes, layout.hpz)
            add("reduce gradients", part.parameters, passes, zero.reduce_bytes, zero.reduce_bucket, False, zero.overlap)
            rest = [small(part.parameters, zero.persistent)]
            add("gather small parameters", rest, 1, zero.weight_bytes, 0, False, False)
        elif part.place in ("sharded", "node"):
            local = part.place == "node" or layout.hpz
            gather("gather frozen, forward", part, passes, local)
            if part.gradient == "through":
                gather("gather frozen, backward", part, passes, local)
    return _joined(found)


def buckets(sizes: Iterable[int], limit: int) -> int:
    """Collectives for parameters in order: DeepSpeed takes parameters into a fetch until `limit` elements are full."""
    count = filled = 0
    for size in sizes:
        filled += size
        if filled >= limit:
            count, filled = count + 1, 0
    return count + (filled > 0)


def _joined(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Of the same kind and scope in one."""
    sums: dict[tuple[str, str], Transfer] = {}
    for one in transfers:
        key = one.kind, one.scope
        if (other := sums.get(key)) is not None:
            one = Transfer(one.kind, one.bytes + other.bytes, one.count + other.count, one.ranks, one.scope, one.hidden)
        sums[key] = one
    return list(sums.values())
