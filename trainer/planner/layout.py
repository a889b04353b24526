"""Layouts of a model over GPUs: as set in the recipe, and alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...recipes import BatchSplit, schema
from ..optim.deepspeed_config import deepspeed_config
from .part import Part

FrozenPlace = Literal["sharded", "node", "replicated"]


@dataclass(frozen=True)
class Layout:
    """A layout; None stands for the recipe's setting.

    frozen: placement of all frozen parts on the GPU. hpz: a second copy of all weights, sharded within a node
    (`zero.hpz`), from which all gathers but the first after an update read; False: as in the recipe. overlap: reduces
    overlap the backward pass (`zero.overlap_comm`). live: elements gathered at the same time
    (`zero.max_live_parameters`).
    """

    name: str
    frozen: FrozenPlace | None = None
    hpz: bool = False
    overlap: bool | None = None
    live: int | None = None

    def place(self, parts: Sequence[Part]) -> list[Part]:
        """The parts placed by this layout; offloaded and cached parts keep their placement."""
        if self.frozen is None:
            return list(parts)
        movable = ("sharded", "replicated")
        return [
            replace(part, place=self.frozen) if part.gradient != "trained" and part.place in movable else part
            for part in parts
        ]

    def hpz_ranks(self, hpz: int | None, gpus: int, node: int) -> int | None:
        """GPUs over which hpZ's copy is sharded; None without one, as on a single node."""
        width = hpz or (node if self.hpz else None)
        return width if width and width < gpus else None


AS_SET = Layout("as the recipe has it")
LAYOUTS = (
    AS_SET,
    Layout("frozen parts sharded over all", frozen="sharded"),
    Layout("frozen parts sharded within a node", frozen="node"),
    Layout("frozen parts replicated on every GPU", frozen="replicated"),
    Layout("hpZ: all weights also sharded within a node", hpz=True),
    Layout("frozen parts replicated, hpZ", frozen="replicated", hpz=True),
    Layout("frozen parts replicated, hpZ, overlap", frozen="replicated", hpz=True, overlap=True),
)


@dataclass(frozen=True)
class Zero:
    """Settings of DeepSpeed's configuration used by a plan; sizes in elements, `*_bytes` per element."""

    weight_bytes: int
    gather_bytes: int
    reduce_bytes: int
    accumulate_bytes: int
    reduce_bucket: int
    prefetch_bucket: int
    max_live: int
    persistent: int
    overlap: bool
    hpz: int | None

    @classmethod
    def of(cls, precision: str, settings: schema.Zero) -> Zero:
        # Batch and clipping are irrelevant here.
        config = deepspeed_config(BatchSplit(1, 1, 1), precision, settings, clip=1.0)
        zero: dict[str, Any] = config["zero_optimization"]
        width = {"fp32": 4, "bf16": 2, "fp16": 2}
        weight = 2 if config["bf16"]["enabled"] else 4
        return cls(
            weight_bytes=weight,
            gather_bytes=1 if zero["zero_quantized_weights"] else weight,
            reduce_bytes=width[config["communication_data_type"]],
            accumulate_bytes=width[config["data_types"]["grad_accum_dtype"]],
            reduce_bucket=zero["reduce_bucket_size"],
            prefetch_bucket=zero["stage3_prefetch_bucket_size"],
            max_live=zero["stage3_max_live_parameters"],
            persistent=zero["stage3_param_persistence_threshold"],
            overlap=zero["overlap_comm"],
            hpz=settings.hpz,
        )

    def under(self, layout: Layout) -> Zero:
        overlap = self.overlap if layout.overlap is None else layout.overlap
        live = self.max_live if layout.live is None else layout.live
        return replace(self, overlap=overlap, max_live=live)


@dataclass(frozen=True)
class Workload:
    """Settings of a recipe used by a plan. optimizer: its name. recomputed: activation checkpointing. averaged: with
    an EMA. workers: loader processes per rank. global_batch, micro_batch: samples per step, and per rank and backward
    pass."""

    zero: Zero
    optimizer: str
    recomputed: bool
    averaged: bool
    workers: int
    global_batch: int
    micro_batch: int


def shard_size(parameters: Sequence[int], ranks: int) -> int:
    """Elements per rank: every parameter is padded to a multiple of the ranks."""
    return sum(-(-size // ranks) for size in parameters)


def shard_bytes(part: Part, plain: int, ranks: int) -> int:
    """Bytes per rank of a part's weights, `plain` per element in the run's precision."""
    return sum(width * shard_size([size], ranks) for size, width in part.stored(plain))
