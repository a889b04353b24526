"""The host never waits for the device inside a micro-batch, and a fixed number of times per step.

A CPU has nothing to wait for, so the places are counted where a GPU would: operators that hand values of a tensor to
Python, applied to tensors that would be on the device. Those are tracked by hand: the parameters, the batch and the
layout, and everything computed from them.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ranked
import runs
from bifrost.kernels import PrefixLayout
from bifrost.recipes import load_recipe
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.flux import FluxTokenizers
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles
from bifrost.trainer.stages import open_controlnet
from bifrost.trainer.stages.controlnet_model import LatentControlNetModel
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
"""Operators whose result, or its shape, the host needs before it continues."""
COPIES = "lift_fresh"
"""What `torch.tensor(values)` and `new_tensor(values)` end in: on a device, after a copy that the host waits for."""


class Syncs(TorchDispatchMode):
    """Counts them on tensors of `device`; `tolist` and `numpy` reach no operator and are counted by themselves."""

    def __init__(self, *device: Any) -> None:
        super().__init__()
        self.found: list[str] = []
        self.device: set[int] = set()
        self.add(*device)

    def add(self, *device: Any) -> None:
        self.device |= {_storage(x) for x in tree_leaves(device) if isinstance(x, Tensor)}

    def __enter__(self) -> "Syncs":
        self.methods = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}
        for name, method in self.methods.items():
            setattr(Tensor, name, self._counted(name, method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self.methods.items():
            setattr(Tensor, name, method)

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
            if _storage(tensor) in self.device:
                self.found.append(name)
            return method(tensor, *arguments, **settings)

        return call

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        inputs = [x for x in tree_leaves((arguments, settings)) if isinstance(x, Tensor)]
        inside = any(_storage(x) in self.device for x in inputs)
        name = str(operator).split(".")[1]
        lengths = name == "repeat_interleave" and (settings or {}).get("output_size") is None
        copied = name == COPIES and any(x.numel() for x in inputs)
        if copied or (inside and (name in WAITS or lengths)):
            self.found.append(name)
        result = operator(*arguments, **(settings or {}))
        made = {_storage(x) for x in tree_leaves(result) if isinstance(x, Tensor)}
        self.device = self.device | made if inside else self.device - (made - {_storage(x) for x in inputs})
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def model_and_batch(*settings: str, device: str = "cpu") -> tuple[PatchLatentModel, dict[str, Any]]:
    recipe = load_recipe("tiny-mllm", ["precision=fp32", *settings])
    folder = locate("builtin:tiny")
    model = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size, True)
    model.load(WeightFiles(folder), seed=0)
    draw = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 16, generator=draw) < 0.8
    batch = {
        "images": torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=draw),
        "input_ids": torch.randint(0, 600, (32,), generator=draw),
        "mask": mask,
        "masked": mask.flatten().nonzero()[:, 0],
    }
    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
    return model.to(device), {**on_device, "text_lengths": (20, 12), "normalizer": 32.0}


VARIANTS = [
    ("branch.loss_tokens=all", "branch.positions=learned", "activation_checkpointing=false"),
    ("branch.loss_tokens=masked", "branch.positions=mrope", "activation_checkpointing=true"),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=["all-learned", "masked-mrope-recomputed"])
def test_no_micro_batch_waits(settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_and_batch(*settings)
    model(**batch)  # the vision encoder's tables are made once per run
    syncs = Syncs(batch, list(model.parameters()), list(model.buffers()))
    of = PrefixLayout.of

    def layout(*arguments: Any) -> PrefixLayout:
        found = list(syncs.found)
        made = of(*arguments)
        syncs.found = found  # made on the host, and sent without waiting
        syncs.add(made.text.ends, made.image.ends, made.both.ends, made.text_rows, made.image_rows, made.positions)
        return made

    monkeypatch.setattr("bifrost.trainer.stages.patch_latent_model.PrefixLayout.of", layout)
    with syncs:
        losses = model(**batch)
        losses.loss.backward()
        assert syncs.found == []
        (
            float(losses.loss.detach()),
            losses.sums.tolist(),
            batch["mask"].nonzero(),
            bool(model.head.bias.grad.isnan().any()),
            losses.loss.new_tensor(1.0),
        )
    seen = ["_local_scalar_dense", "tolist", "nonzero", "_local_scalar_dense", COPIES]
    assert syncs.found == seen, "it would have seen them"


def controlnet_and_batch(device: str = "cpu") -> tuple[LatentControlNetModel, dict[str, Any]]:
    sharded = "flux.placement={transformer: sharded, vae: sharded, text: sharded, vision_encoder: sharded}"
    stage = open_controlnet(load_recipe("tiny-controlnet", ["precision=fp32", sharded]))
    model = stage.build(activation_checkpointing=True)
    stage.load(model)
    draw = torch.Generator().manual_seed(0)
    channels, height, width = stage.latents
    batch = {
        "images": torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8, generator=draw),
        "flux_images": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=draw),
        "posterior": torch.randn(4, *stage.latents, generator=draw),  # two draws per sample
        "noise": torch.randn(4, height * width // 4, 4 * channels, generator=draw),
        "level": torch.randn(4, generator=draw),
        **FluxTokenizers(stage.folder)(["a red circle", ""])._asdict(),
    }
    return model.to(device), {**{name: x.to(device) for name, x in batch.items()}, "normalizer": 2.0}


def test_no_controlnet_micro_batch_waits() -> None:
    model, batch = controlnet_and_batch()
    model(**batch)  # the vision encoder's tables are made once per run
    with Syncs(batch, list(model.parameters()), list(model.buffers())) as syncs:
        model(**batch).loss.backward()
    assert syncs.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", VARIANTS, ids=["all-learned", "masked-mrope-recomputed"])
def test_cuda_sees_no_micro_batch_wait(settings: tuple[str, ...]) -> None:
    model, batch = model_and_batch(*settings, device="cuda")
    backward_without_wait(model, batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_no_controlnet_micro_batch_wait() -> None:
    backward_without_wait(*controlnet_and_batch("cuda"))


def backward_without_wait(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()  # libraries begin, tables are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def syncs_of_steps(arguments: list[str]) -> list[dict[str, int]]:
    """In every step of a run, how often our functions, and DeepSpeed, took values out of tensors."""
    import sys

    from bifrost.trainer.training import train as run_module

    steps: list[dict[str, int]] = []
    counts: Counter[str] = Counter()

    def whose() -> str | None:
        """By the nearest frame; the layout and the sample's draws are made on the host, from host tensors."""
        frame = sys._getframe(2)
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if "/data/" in file or ("/kernels/attention" in file and name == "of") or file.endswith("/masking.py"):
                return None
            if "/deepspeed/" in file:
                return "DeepSpeed"
            if "/trainer/" in file and "/tests/" not in file:
                return f"{Path(file).name}: {name}"
            frame = frame.f_back
        return None

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if owner := whose():
                counts[owner] += 1
            return method(*arguments, **settings)

        return call

    loop = run_module.loop.run

    def watched(parts: Any, progress: Any) -> bool:
        after = parts.after_step

        def after_step(progress: Any) -> None:
            steps.append(dict(counts))
            counts.clear()
            after(progress)

        parts.after_step = after_step
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            setattr(Tensor, name, counted(getattr(Tensor, name)))
        return loop(parts, progress)

    run_module.loop.run = watched
    ranked.succeed(arguments)
    return steps


@pytest.mark.multi
def test_a_step_waits_as_often_with_three_passes_as_with_one(shards: Path, tmp_path: Path) -> None:
    found = []
    for passes in (1, 3):
        settings = ("steps=6", "micro_batch=2", f"global_batch={2 * passes}", "log_every=10", "previews.every=null")
        (rank,) = ranked.run(syncs_of_steps, 1, runs.arguments(shards, tmp_path / str(passes), *settings))
        assert rank.code == 0, rank.err
        found.append(rank.value[3:-1])  # in the first ones DeepSpeed learns the order of the layers; the last one saves
    one, three = found
    ours = [{place: n for place, n in step.items() if place != "DeepSpeed"} for step in one]
    exchange = {"loop.py: _exchange": 1, "process_group.py: total": 1}
    assert all(step == exchange for step in ours), "one exchange per step"
    assert three == one, "a micro-batch waits for the device"
