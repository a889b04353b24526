"""`bifrost bench engine`: steps of a recipe's model under a run's engine, DeepSpeed's ZeRO-3, on synthetic batches.

Model, loading of weights, engine, kernels and moving average are those of a run; there are no shards, no run folder and
no saves. Every step has one pass of `micro_batch` samples per rank.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ...data import Batch
from ...recipes import Recipe
from ..distributed.process_group import Ranks, join
from ..errors import RunError
from ..models.kernel_selection import choose_kernels, make_deterministic
from ..optim.deepspeed_config import deepspeed_config
from ..optim.ema import Ema
from ..optim.engine import Engine, partitioned, require_quantizer
from ..planner import parts_of, plan, workload
from ..planner.devices import this_device
from ..planner.flux_shapes import hidden_width
from ..planner.opened import LatentControl, PatchLatents
from ..planner.part import Part
from ..planner.timing import done_flops, useful_flops
from ..stages import StageModel, open_stage
from ..stages.controlnet import ControlNetStage
from ..stages.patch_latents import PatchLatentStage
from ..stages.target_encoders import TargetVae
from ..training.transfer import on_device
from . import synthetic
from .controlnet_shapes import scaled_stage
from .engine_table import Measured, Planned, table
from .machine import device_kind, machine, write_record
from .random_weights import randomised
from .routed import Clock, Mark
from .shapes import scaled
from .short_run import WARMUP

CPU_LAYERS, CPU_WIDTH = 4, 768
Stage = PatchLatentStage | ControlNetStage


@dataclass(frozen=True)
class Size:
    """Layers (FLUX: double blocks) and hidden width of a scaled-down model; None for the model's own."""

    layers: int | None = None
    width: int | None = None


def bench(recipe: Recipe, *, random: bool, size: Size, steps: int, against_plan: bool, out: Path | None) -> int:
    """Measure `steps` steps on this rank; rank 0 prints the table and writes `out`/engine.json. Returns the exit code.

    random: draw the weights instead of reading the model's files. against_plan: print the plan's figures as well.
    """
    if recipe.kernels.deterministic:
        make_deterministic()
    ranks = join()
    # The plan's weak scaling: with the recipe's own global_batch a step on one GPU takes dozens of passes.
    settings = {"global_batch": recipe.micro_batch * ranks.size, "init_from": None}
    settings["previews"] = recipe.previews.model_copy(update={"every": None})
    recipe = recipe.model_copy(update=settings)
    stage = ranks.agreed(lambda: opened(recipe, random, size))
    work = stage.kernel_work(recipe.micro_batch, recipe.precision)
    stage.kernels, kernels = ranks.agreed(lambda: choose_kernels(recipe.kernels, *work, ranks))
    text = synthetic.text_tokens(stage)
    parts = parts_of(counted(stage), recipe.precision, text, text)
    try:
        measured = measure(recipe, stage, parts, ranks, steps)
    except torch.OutOfMemoryError as error:
        raise RunError("bench engine: does not fit in the memory of this device; lower micro_batch") from error
    if ranks.first:
        row = plan(parts, workload(recipe), ranks.size, this_device())
        record = {
            **_settings(recipe, stage),
            "ranks": ranks.size,
            "weights": "random" if random else "files",
            "kernels": {operation: chosen["provider"] for operation, chosen in kernels.items()},
            "steps": steps,
            "device": device_kind(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine("deepspeed", "transformers", "triton"),
            "measured": asdict(measured),
            "planned": asdict(Planned.of(row)) if against_plan else None,
        }
        print(table(record, measured, Planned.of(row) if against_plan else None))
        if out:
            write_record(out, "engine.json", record)
    dist.destroy_process_group()  # its threads may abort a process that exits while they run
    return 0


def opened(recipe: Recipe, random: bool, size: Size) -> Stage:
    """The recipe's stage: with its model's files, or with random weights, then also scaled down; on a CPU by default.
    RunError names what cannot be scaled."""
    stage: Any = open_stage(recipe, for_counting=random)
    if not random:
        return stage
    layers, width = size.layers, size.width
    on_cpu = not torch.cuda.is_available()
    if isinstance(stage, PatchLatentStage):
        text = stage.config.text_config
        if on_cpu and text.hidden_size > CPU_WIDTH:
            layers, width = layers or min(CPU_LAYERS, text.num_hidden_layers), width or CPU_WIDTH
        stage.config = scaled(stage.config, layers, width)
        return randomised(stage)
    full = hidden_width(stage.folder.transformer)
    if on_cpu and full > CPU_WIDTH:
        layers, width = layers or min(CPU_LAYERS, stage.folder.blocks[0]), width or CPU_WIDTH
    if width not in (None, full) and "text" not in stage.flux.placement.cached:
        raise RunError(f"--width {width}: T5 and CLIP keep their widths; set flux.placement.text=cached")
    return randomised(scaled_stage(stage, layers, width))


def counted(stage: Stage) -> PatchLatents | LatentControl:
    """The stage's model as a plan counts it."""
    if isinstance(stage, PatchLatentStage):
        own = stage.config, stage.backbone, stage.branch, stage.image_size, stage.seed
        if isinstance(stage.encoder, TargetVae):
            return PatchLatents(*own, stage.encoder.flux, stage.encoder.folder)
        return PatchLatents(*own, encoder=stage.encoder.config if stage.encoder else None)
    latents = stage.controlnet.latents
    return LatentControl(stage.config, stage.flux, stage.folder, stage.shape, latents, stage.square, (stage.square,))


def measure(recipe: Recipe, stage: Stage, parts: list[Part], ranks: Ranks, steps: int) -> Measured:
    """Build, load and train the stage's model for WARMUP + `steps` steps and a profiled one. RunError if the weights
    become useless, so that an update is skipped. parts: of the model, as planned."""
    device, samples = ranks.device, recipe.micro_batch
    ranks.agreed(lambda: require_quantizer(recipe.zero, device))
    arrays = synthetic.micro_batch(stage, samples, ranks.rank * samples)
    batch = Batch(arrays, [], [])
    batch = batch.pin_memory() if device.type == "cuda" else batch
    index = np.arange(samples * ranks.size)
    normalizer = stage.normalizer(np.zeros_like(index), index, ranks.size)
    before, begun = live_bytes(device), time.perf_counter()
    engine, ema = _engine(recipe, stage, ranks)
    startup_s = time.perf_counter() - begun

    def step(mark: Mark = lambda name: None) -> None:
        train_step(engine, ema, on_device(batch, device) | {"normalizer": normalizer}, recipe.optimizer.lr, mark)

    for _ in range(WARMUP):
        step()
    held = live_bytes(device) - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    for number in range(steps):
        step(lambda name, number=number: clock(f"{number} {name}"))
    times = _by_step(clock.seconds(), steps)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    retries = torch.cuda.memory_stats(device)["num_alloc_retries"] if device.type == "cuda" else None
    found = ranks.gather((held, peak, retries))
    return Measured.of(
        times,
        samples * ranks.size,
        (samples * useful_flops(parts), samples * done_flops(parts, recipe.activation_checkpointing)),
        this_device() if recipe.precision == "bf16" else None,
        startup_s=startup_s,
        held_bytes=max(held for held, *_ in found),
        peak_bytes=max(peak for _, peak, _ in found) if peak is not None else None,
        alloc_retries=sum(retries for *_, retries in found) if retries is not None else None,
        launches=launches(step, device),
    )


def _engine(recipe: Recipe, stage: Stage, ranks: Ranks) -> tuple[Engine, Ema | None]:
    """The stage's model, loaded, under the engine of a run, and its moving average."""
    on_cpu = ranks.device.type == "cpu"
    config = deepspeed_config(recipe.split(ranks.size), recipe.precision, recipe.zero, recipe.optimizer.clip, on_cpu)
    with partitioned(config, ranks.device):
        model: StageModel = stage.build(recipe.activation_checkpointing)
    ranks.agreed(lambda: stage.load(model))  # type: ignore[arg-type]
    engine = Engine(model, recipe.optimizer, config, ranks)
    ema = Ema(engine.masters(), recipe.ema.decay, engine.model.statistics()) if recipe.ema else None
    return engine, ema


def train_step(engine: Engine, ema: Ema | None, batch: dict[str, Any], lr: float, mark: Mark) -> None:
    """One step of one pass, as the training loop makes it. RunError if it was skipped."""
    losses = engine.forward(batch)
    mark("forward")
    engine.backward(losses.loss)
    mark("backward")
    # The loop's exchange: the step's only values that the host reads.
    read: Tensor = torch.stack((losses.loss.detach(), engine.grad_norm()))
    engine.ranks.total(read.tolist())
    mark("exchange")
    applied = engine.step(lr, skip=False)
    if applied and ema is not None:
        ema.update(engine.masters(), engine.model.statistics())
    mark("update")
    if not applied:
        raise RunError("bench engine: the gradients are not finite; lower optimizer.lr")


def _by_step(seconds: dict[str, float], steps: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{} for _ in range(steps)]
    for key, spent in seconds.items():
        number, _, name = key.partition(" ")
        found[int(number)][name] = spent
    return found


def live_bytes(device: torch.device) -> int:
    """Bytes of all tensors: those of the GPU's allocator; without a GPU the storages that Python can reach."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    # Not isinstance(), which asks some objects for their __class__, and they warn.
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    # Those of meta and fake tensors have no memory.
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.device.type == device.type}.values())


def launches(step: Callable[[], None], device: torch.device) -> int | None:
    """Kernels that a step launches; without a GPU, torch's operators that it calls. None if neither can be seen."""
    gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])], acc_events=True
    ) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    events: Any = profiler.events() or []
    if gpu:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        return len([e for e in kernels if not e.name.startswith(("Memcpy", "Memset"))]) or None

    def inner(event: Any) -> bool:
        return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")

    return len([e for e in events if e.name.startswith("aten::") and not inner(e)]) or None


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What was measured, for the record."""
    if isinstance(stage, PatchLatentStage):
        text = stage.config.text_config
        shape = {"layers": text.num_hidden_layers, "width": text.hidden_size, "placement": stage.backbone.placement}
    else:
        placement, folder = stage.flux.placement.model_dump(mode="json"), stage.folder
        shape = {"layers": list(folder.blocks), "width": hidden_width(folder.transformer), "placement": placement}
    return {
        "recipe": recipe.name,
        "stage": recipe.stage,
        **shape,
        "text_tokens": synthetic.text_tokens(stage),
        "micro_batch": recipe.micro_batch,
        "precision": recipe.precision,
        "activation_checkpointing": recipe.activation_checkpointing,
    }
