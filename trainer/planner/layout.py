"""How a plan may lay a model over GPUs: as the recipe says, and what if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...recipes import Recipe
from ..optim.engine import deepspeed_config
from .flops import Part

FrozenPlace = Literal["sharded", "node", "replicated"]


@dataclass(frozen=True)
class Layout:
    """frozen: where all frozen parts lie that are on the GPU, None for the recipe's own choice. hpz: a second copy of
    all weights, cut within a node (`zero.hpz`), which all gathers but the first after an update read; False leaves that
    to the recipe. overlap: reduces run beside the backward pass (`zero.overlap_comm`), None for the recipe's own.
    live: elements that may be gathered at a time (`zero.max_live_parameters`), None for the recipe's.
    """

    name: str
    frozen: FrozenPlace | None = None
    hpz: bool = False
    overlap: bool | None = None
    live: int | None = None

    def place(self, parts: Sequence[Part]) -> list[Part]:
        """The parts where this layout puts them; those in host memory or in a cache stay there."""
        if self.frozen is None:
            return list(parts)
        movable = ("sharded", "replicated")
        return [
            replace(part, place=self.frozen) if part.gradient != "trained" and part.place in movable else part
            for part in parts
        ]

    def hpz_ranks(self, hpz: int | None, gpus: int, node: int) -> int | None:
        """GPUs that hpZ's copy is cut over; None without one, as on a single node."""
        width = hpz or (node if self.hpz else None)
        return width if width and width < gpus else None


AS_SET = Layout("as the recipe has it")
LAYOUTS = (
    AS_SET,
    Layout("frozen parts cut over all", frozen="sharded"),
    Layout("frozen parts cut within a node", frozen="node"),
    Layout("frozen parts whole on every GPU", frozen="replicated"),
    Layout("hpZ: all weights also cut within a node", hpz=True),
    Layout("frozen parts whole, hpZ", frozen="replicated", hpz=True),
    Layout("frozen parts whole, hpZ, overlap", frozen="replicated", hpz=True, overlap=True),
)


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's configuration says that a plan needs; sizes in elements, `bytes` of an element."""

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
    def of(cls, recipe: Recipe) -> Zero:
        config = deepspeed_config(recipe.model_copy(update={"global_batch": recipe.micro_batch}), 1)
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
            hpz=recipe.zero.hpz,
        )

    def under(self, layout: Layout) -> Zero:
        overlap = self.overlap if layout.overlap is None else layout.overlap
        live = self.max_live if layout.live is None else layout.live
        return replace(self, overlap=overlap, max_live=live)


@dataclass(frozen=True)
class Workload:
    """What a plan takes from a recipe. recomputed: layers run twice, their activations are not kept. averaged: with an
    EMA. workers: of the loader, on each rank."""

    zero: Zero
    recomputed: bool
    averaged: bool
    workers: int

    @classmethod
    def of(cls, recipe: Recipe) -> Workload:
        averaged, workers = recipe.ema is not None, recipe.data.workers
        return cls(Zero.of(recipe), recipe.activation_checkpointing, averaged, workers)


def shard_size(parameters: Sequence[int], ranks: int) -> int:
    """Elements of one rank's slices: every parameter is padded to a multiple of the ranks."""
    return sum(-(-size // ranks) for size in parameters)


def small(parameters: Sequence[int], threshold: int) -> int:
    """Elements of the parameters that stay gathered."""
    return sum(size for size in parameters if size <= threshold)
