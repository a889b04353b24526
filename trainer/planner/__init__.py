"""Predicted cost of a recipe on N GPUs, before it is submitted: memory, traffic, time.

`plan` combines `flops`, `memory`, `traffic` and `timing`; `bifrost plan` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...recipes import BatchSplit, Recipe
from ..errors import RunError
from ..models.image_grids import Grid
from .caches import cached_bytes
from .devices import Device
from .flops import patch_latent_parts
from .flux_flops import controlnet_parts
from .layout import AS_SET, Layout, Workload, Zero
from .memory import Memory, memory
from .opened import LatentControl, PatchLatents
from .optimizer import exchanges, stored_bytes
from .part import Part, combined
from .sources import edited_share
from .timing import Timing, timing
from .traffic import Transfer, traffic

NODE = 8
"""GPUs per node if no device is given."""


@dataclass(frozen=True)
class Row:
    """The plan for one number of GPUs. times, fits and derived values are None without a device that provides them."""

    gpus: int
    layout: Layout
    micro_batch: int
    passes: int
    memory: Memory
    transfers: list[Transfer]
    times: Timing | None
    usable: float | None
    """Bytes per GPU available to tensors."""
    largest_micro_batch: int | None

    @property
    def global_batch(self) -> int:
        return self.gpus * self.micro_batch * self.passes

    @property
    def received(self) -> float:
        """Bytes received per GPU and step."""
        return sum(one.bytes for one in self.transfers)

    @property
    def samples_s(self) -> float | None:
        """Samples per second of all GPUs."""
        return None if self.times is None else self.global_batch / self.times.as_set

    @property
    def fits(self) -> bool | None:
        return None if self.usable is None else self.memory.peak <= self.usable


def workload(recipe: Recipe) -> Workload:
    """The recipe's settings that a plan uses."""
    return Workload(
        zero=Zero.of(recipe.precision, recipe.zero),
        optimizer=recipe.optimizer.name,
        recomputed=recipe.activation_checkpointing,
        averaged=recipe.ema is not None,
        workers=recipe.data.workers,
        global_batch=recipe.global_batch,
        micro_batch=recipe.micro_batch,
    )


def open_model(recipe: Recipe) -> PatchLatents | LatentControl:
    """The recipe's model; RunError names what of its folders cannot be used. No weights or tokenizers are read."""
    if recipe.stage == "patch-latents":
        edited = edited_share(recipe.data, recipe.global_batch, recipe.steps)
        opened = PatchLatents.open(recipe.backbone, recipe.branch, recipe.data, recipe.seed, recipe.flux)
        return replace(opened, edited=edited, texts=bool(recipe.data.understanding))
    assert recipe.flux is not None, "required by the recipe schema"
    model = LatentControl.open(recipe.backbone, recipe.flux, recipe.controlnet, recipe.data)
    model.shape.require_use(model.folder.transformer)
    return model


def parts(
    recipe: Recipe, text_tokens: float = 80, longest: float | None = None, shares: Sequence[float] | None = None
) -> list[Part]:
    """The parts of the recipe's model for prompts of `text_tokens` tokens on average and `longest` at most, by default
    `branch.max_text_tokens` (stage 1; FLUX pads its text). With `data.buckets`, FLOPs are the mean over the buckets and
    bytes those of the largest; shares: of the samples in each, None: equal ones. With editing pairs, whose source
    images are in addition to these tokens, FLOPs are the mean over them and the other samples, and bytes those of a
    pair. RunError as of `open_model`."""
    return parts_of(open_model(recipe), recipe.precision, text_tokens, longest, shares)


def parts_of(
    model: PatchLatents | LatentControl,
    precision: str,
    text_tokens: float,
    longest: float | None = None,
    shares: Sequence[float] | None = None,
) -> list[Part]:
    """The parts of an opened model; see `parts`. precision: `bf16` or `fp32`."""
    if isinstance(model, PatchLatents):
        every = [_patch_latents(model, precision, text_tokens, longest, grid.latents) for grid in model.grids]
    else:
        every = [controlnet_parts(model, precision, grid) for grid in model.grids]
    shares = [1 / len(every)] * len(every) if shares is None else shares
    return every[0] if len(every) == 1 else [combined(same, shares) for same in zip(*every, strict=True)]


def _patch_latents(
    model: PatchLatents, precision: str, text_tokens: float, longest: float | None, grid: Grid
) -> list[Part]:
    """The parts of stage 1 on images of one shape, with its share of editing pairs."""
    given = model, precision, text_tokens, longest, grid
    plain = patch_latent_parts(*given)
    if not model.edited:
        return plain
    pairs = zip(plain, patch_latent_parts(*given, edited=True), strict=True)
    return [combined(both, (1 - model.edited, model.edited)) for both in pairs]


def caches(recipe: Recipe) -> dict[str, int]:
    """Kind of cache that the recipe reads -> bytes per sample of the data. RunError as of `open_model`."""
    return cached_bytes(open_model(recipe), recipe.precision)


def batch(global_batch: int, micro_batch: int, gpus: int) -> BatchSplit:
    """The global batch on `gpus` GPUs, with the given micro_batch or, if it does not divide, the largest smaller one
    that does. RunError if none does."""
    for size in range(micro_batch, 0, -1):
        if global_batch % (size * gpus) == 0:
            return BatchSplit(global_batch, size, gpus)
    near = -(-global_batch // gpus) * gpus
    raise RunError(
        f"--gpus {gpus}: global_batch {global_batch} does not divide over {gpus} GPUs; set global_batch to a"
        f" multiple of {gpus}, such as {near}"
    )


def plan(
    parts: Sequence[Part],
    work: Workload,
    gpus: int,
    device: Device | None = None,
    layout: Layout = AS_SET,
    weak: bool = False,
    previews: float = 0.0,
) -> Row:
    """The plan for `gpus` GPUs.

    weak: every GPU has `micro_batch` samples and one pass per step, so that the global batch grows with the GPUs.
    previews: bytes of the image generator for previews on rank 0.
    """
    whole = work.micro_batch * gpus if weak else work.global_batch
    split = batch(whole, work.micro_batch, gpus)
    micro_batch, passes = split.micro_batch, split.passes
    node = device.gpus_per_node if device else NODE
    placed = layout.place(parts)
    needs = memory(parts, work, layout, gpus, node, micro_batch, previews)
    transfers = traffic(parts, work.zero, layout, gpus, node, passes)
    transfers += exchanges(parts, work.optimizer, gpus)
    timed = device is not None and device.bf16_tflops is not None
    usable = device.hbm_gb * 1e9 * device.usable_memory - device.runtime_gb * 1e9 if device else None
    return Row(
        gpus,
        layout,
        micro_batch,
        passes,
        needs,
        transfers,
        timing(placed, work, device, transfers, gpus, micro_batch, passes) if device and timed else None,
        usable,
        needs.largest_micro_batch(usable, micro_batch) if usable else None,
    )


def checkpoint_bytes(parts: Sequence[Part], work: Workload) -> int:
    """Bytes of a checkpoint: masters, optimizer state and EMA of the trained parameters, in fp32."""
    trained = sum(part.size for part in parts if part.gradient == "trained")
    return 4 * (1 + work.averaged) * trained + stored_bytes(parts, work.optimizer)


def checkpoint_s(size: float, gpus: int, device: Device) -> float:
    """Seconds to write `size` bytes from all nodes at once."""
    return size / (1e9 * min(device.nodes(gpus) * device.storage_node_gbs, device.storage_gbs))


def cost(row: Row, device: Device, samples: int) -> dict[str, float] | None:
    """Cost of training on `samples` samples: hours, GPU-hours, and energy of the GPUs at full power."""
    if row.samples_s is None:
        return None
    hours = samples / row.samples_s / 3600
    return {
        "hours": hours,
        "gpu_hours": hours * row.gpus,
        "energy_mwh": hours * row.gpus * device.watts / 1e6,
    }


def as_json(row: Row) -> dict[str, Any]:
    """The row as plain values; bytes and seconds."""
    found: dict[str, Any] = {
        "gpus": row.gpus,
        "layout": row.layout.name,
        "global_batch": row.global_batch,
        "micro_batch": row.micro_batch,
        "passes": row.passes,
        "memory": {
            "held": row.memory.held,
            "pass": row.memory.per_pass,
            "encoding": row.memory.encoding,
            "update": row.memory.update,
            "previews": row.memory.previews,
            "static": row.memory.static,
            "peak": row.memory.peak,
            "usable": row.usable,
            "fits": row.fits,
            "largest_micro_batch": row.largest_micro_batch,
        },
        "traffic": [
            {"kind": t.kind, "bytes": t.bytes, "collectives": t.count, "over": t.scope, "hidden": t.hidden}
            for t in row.transfers
        ],
    }
    if row.times is not None:
        t = row.times
        found["seconds"] = {
            "compute": t.compute,
            "transfers_ahead": t.ahead,
            "transfers_behind": t.behind,
            "links_within_nodes": t.intra,
            "links_between_nodes": t.inter,
            "update": t.update,
            "data": t.data,
            "step_serial": t.serial,
            "step_as_set": t.as_set,
            "step_overlapped": t.overlapped,
        }
        found.update(samples_s=row.samples_s, mfu=t.mfu, hfu=t.hfu, bound=t.bound)
    return found
