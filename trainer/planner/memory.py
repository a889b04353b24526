"""Bytes per GPU: what DeepSpeed's ZeRO-3 holds permanently, and what a pass or an update needs in addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..optim.rules import SUB_GROUP
from .layout import Layout, Workload, shard_bytes, shard_size
from .optimizer import at_work_bytes, state_bytes
from .part import Part

GATHERED_SHARE = 2
"""A gathered bucket briefly exists twice: as received, and as the parameters copied from it."""


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU, by name. held: permanently. per_pass: in addition at the peak of a backward pass; encoding: in
    addition in the pass of the frozen encoders before it; update: in addition in the optimizer step. per_sample,
    encoded_sample: the parts of `per_pass` and `encoding` that grow with the micro-batch."""

    held: dict[str, float]
    per_pass: dict[str, float]
    encoding: dict[str, float]
    update: dict[str, float]
    per_sample: float
    encoded_sample: float
    previews: float = 0.0
    """Only on rank 0's GPU, between steps: the image generator for stage 1's previews."""

    @property
    def static(self) -> float:
        return sum(self.held.values())

    @property
    def peak(self) -> float:
        passes = (self.per_pass, self.encoding, self.update)
        return self.static + max(*(sum(needed.values()) for needed in passes), self.previews)

    def largest_micro_batch(self, usable: float, micro_batch: int) -> int:
        """Samples per pass that fit into `usable` bytes, from a plan for `micro_batch`; 0 if none fits."""
        if self.static + max(sum(self.update.values()), self.previews) > usable:
            return 0
        passes = ((self.per_pass, self.per_sample), (self.encoding, self.encoded_sample))
        free = [usable - self.static - sum(needed.values()) + sample * micro_batch for needed, sample in passes]
        return max(0, min(int(room / sample) for room, (_, sample) in zip(free, passes, strict=True) if sample))


def memory(
    parts: Sequence[Part],
    work: Workload,
    layout: Layout,
    gpus: int,
    node: int,
    micro_batch: int,
    previews: float = 0.0,
) -> Memory:
    """Memory of `parts` with `layout` on `gpus` GPUs, `node` of them per node. previews: see `Memory`."""
    zero = work.zero.under(layout)
    placed = layout.place(parts)
    trained = [part for part in placed if part.gradient == "trained"]
    owners = [part for part in placed if not part.shared]
    frozen = [part for part in owners if part.gradient != "trained"]
    sharded = [part for part in owners if part.place == "sharded"]
    second = layout.hpz_ranks(zero.hpz, gpus, node)
    node = min(node, gpus)
    own = sum(shard_size(part.parameters, gpus) for part in trained)
    weight = zero.weight_bytes
    shards = {"sharded": gpus, "node": node, "replicated": 1}
    held: dict[str, float] = {
        # In fp32 too: DeepSpeed compares a device with its name and therefore never shares the slices with the masters.
        "trained weights": weight * own,
        "masters": 4 * own,
        "moments": state_bytes(trained, work.optimizer, gpus),
        "gradients": zero.accumulate_bytes * own,
        "EMA": 4 * own if work.averaged else 0,
        "frozen weights": sum(shard_bytes(p, weight, shards[p.place]) for p in frozen if p.place in shards),
        # On one GPU they are views of their slices.
        "small parameters, whole": sum(
            size * width
            for part in sharded
            for size, width in part.stored(weight)
            if size <= zero.persistent and gpus > 1
        ),
        "second copy (hpZ), frozen": sum(
            shard_bytes(p, weight, second) for p in frozen if second and p.place == "sharded"
        ),
        "reduce bucket": zero.reduce_bytes * zero.reduce_bucket,
    }
    gathered = [one for part in owners if part.place in ("sharded", "node") for one in part.stored(weight)]
    eight_bits = [size for part in placed for size, width in part.stored(weight) if width == 1]
    largest = max((size for part in placed if part.gradient != "none" for size in part.parameters), default=0)
    large = [one for one in gathered if one[0] > zero.persistent]
    elements = sum(size for size, _ in large)
    trainable = sum(part.size for part in trained)
    kept = sum(part.kept_recomputed if work.recomputed else part.kept for part in placed)
    # The backward pass begins in the frozen part behind the trained one, if there is one; all is kept then.
    returned = [part for part in owners if part.gradient != "none"]
    first = max(returned, key=lambda part: (part.gradient == "through", part.layer + part.gradients))
    layer, flight = (first.layer, first.gradients_recomputed) if work.recomputed else (0.0, first.gradients)
    gradient = max(first.parameters) if first.gradient == "trained" else 0
    offloaded = max((weight * part.size for part in placed if part.place == "offloaded"), default=0)
    read = {
        "gathered weights": widest_first(large, zero.max_live) if gpus > 1 else 0,
        "gather in flight": GATHERED_SHARE * weight * min(elements, zero.prefetch_bucket + largest) if gpus > 1 else 0,
        "dequantized layer": weight * max(eight_bits, default=0),
    }
    per_pass = {
        **read,
        # The trained part of the copy is freed with every update.
        "second copy (hpZ), trained": weight * sum(shard_size(p.parameters, second) for p in trained if second),
        "gradients of a layer": 2 * weight * gradient,
        # The bucket is copied into the ranks' shards before it is sent.
        "reduce in flight": zero.reduce_bytes * min(zero.reduce_bucket, trainable),
        "activations": micro_batch * kept + sum(part.kept_once for part in placed),
        "recomputed layer": micro_batch * layer,
        "gradients of activations": micro_batch * flight,
        "at work from host memory": offloaded,
    }
    encoded = max((part.in_use for part in placed if part.place != "cached"), default=0.0)
    encoding = {**read, "encoder at work": micro_batch * encoded, "at work from host memory": offloaded}
    # The optimizer's gradient is a flat copy of the accumulated slices, made per DeepSpeed sub-group.
    update: dict[str, float] = {
        "flat gradients": 4 * min(own, SUB_GROUP),
        "optimizer at work": at_work_bytes(trained, work.optimizer, gpus),
    }
    return Memory(held, per_pass, encoding, update, kept + layer + flight, encoded, previews)


def widest_first(parameters: Sequence[tuple[int, int]], limit: int) -> int:
    """The most bytes that `limit` elements of parameters of (elements, bytes per element) can take."""
    total = 0
    for size, width in sorted(parameters, key=lambda one: -one[1]):
        taken = min(size, limit)
        total, limit = total + width * taken, limit - taken
    return total
