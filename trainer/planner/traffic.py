"""Communication volume per step, by kind, and the number of collectives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from .layout import Layout, Zero
from .part import Part


@dataclass(frozen=True)
class Transfer:
    """One kind of transfer in a step: bytes received per GPU, in `count` collectives over `ranks` GPUs.

    hidden: issued ahead, so that it can overlap computation.
    """

    kind: str
    bytes: float
    count: int
    ranks: int
    scope: Literal["all", "node"]
    hidden: bool


def traffic(parts: Sequence[Part], zero: Zero, layout: Layout, gpus: int, node: int, passes: int) -> list[Transfer]:
    """Transfers of a step with `passes` backward passes; empty on one GPU."""
    zero = zero.under(layout)
    second = layout.hpz_ranks(zero.hpz, gpus, node)
    node = min(node, gpus)
    found: list[Transfer] = []

    def add(kind: str, sent: int, times: int, count: int, ranks: int, hidden: bool) -> None:
        if sent and times and ranks > 1:
            received = float(times * sent) * (ranks - 1) / ranks
            scope = "all" if ranks == gpus else "node"
            found.append(Transfer(kind, received, times * count, ranks, scope, hidden))

    placed = layout.place(parts)
    gathered = [part for part in placed if part.place in ("sharded", "node")]
    byte = zero.gather_bytes
    large = {part.name: [one for one in part.stored(byte) if one[0] > zero.persistent] for part in gathered}
    # DeepSpeed prefetches up to max_live elements, then as much as has been freed: about a parameter.
    sizes = [size for part in gathered if not part.shared for size, _ in large[part.name]]
    all_live = sum(sizes) <= zero.max_live
    bucket = zero.prefetch_bucket if all_live else min(zero.prefetch_bucket, usual(sizes))

    def gather(kind: str, stored: Sequence[tuple[int, int]], times: int, ranks: int) -> None:
        ahead = zero.prefetch_bucket > 0
        add(kind, sent(stored), times, buckets([size for size, _ in stored], bucket), ranks, ahead)

    # Parameters that are gathered when the backward pass begins stay gathered for it.
    live = zero.max_live
    for part in sorted(gathered, key=lambda part: part.gradient != "through"):
        trained = part.gradient == "trained"
        over = node if part.place == "node" else gpus
        again = second or over
        what = "trained" if trained else "frozen"
        # Copies sharded within a node are rebuilt from the first gather after every update.
        first = passes if not second else 1 if trained else 0
        if not (part.shared and all_live):  # else still gathered from its first use
            gather(f"gather {what}, forward", large[part.name], first, over)
            gather(f"gather {what}, forward", large[part.name], passes - first, again)
        if part.gradient != "none":
            gather(f"gather {what}, backward", beyond(large[part.name], live), passes, again)
            live = max(0, live - sum(size for size, _ in large[part.name]))
        kept = [one for one in part.stored(zero.weight_bytes) if one[0] <= zero.persistent and not part.shared]
        add("gather small parameters", sent(kept), 1, len(kept), over, False)
    sizes = [size for part in gathered if part.gradient == "trained" for size in part.parameters]
    reduced = zero.reduce_bytes * sum(sizes)
    add("reduce gradients", reduced, passes, packs(sizes, zero.reduce_bucket), gpus, zero.overlap)
    return _joined(found)


def sent(stored: Iterable[tuple[int, int]]) -> int:
    """Bytes of parameters of (elements, bytes per element)."""
    return sum(size * width for size, width in stored)


def beyond(stored: Sequence[tuple[int, int]], live: int) -> list[tuple[int, int]]:
    """What to gather in a pass from last to first when the last `live` elements are already gathered."""
    rest = []
    for size, width in reversed(stored):
        if size > live:
            rest.append((size - live, width))
        live = max(0, live - size)
    return rest


def buckets(sizes: Iterable[int], limit: int) -> int:
    """Number of gathers for parameters in order: DeepSpeed adds parameters to a fetch until it has `limit` elements."""
    count = filled = 0
    for size in sizes:
        filled += size
        if filled >= limit:
            count, filled = count + 1, 0
    return count + (filled > 0)


def usual(sizes: Iterable[int]) -> int:
    """The median parameter size, weighted by elements."""
    ordered, passed = sorted(sizes), 0
    for size in ordered:
        passed += size
        if 2 * passed >= sum(ordered):
            return size
    return 0


def packs(sizes: Iterable[int], limit: int) -> int:
    """Number of reduces for gradients in order: DeepSpeed sends a bucket when the next gradient would not fit."""
    count = filled = 0
    for size in sizes:
        if filled and filled + size > limit:
            count, filled = count + 1, 0
        filled += size
    return count + (filled > 0)


def _joined(transfers: Iterable[Transfer]) -> list[Transfer]:
    """Merge transfers of the same kind and scope."""
    sums: dict[tuple[str, str], Transfer] = {}
    for one in transfers:
        key = one.kind, one.scope
        if (other := sums.get(key)) is not None:
            one = Transfer(one.kind, one.bytes + other.bytes, one.count + other.count, one.ranks, one.scope, one.hidden)
        sums[key] = one
    return list(sums.values())
