"""Frozen parts are placed as in the recipe, and no number changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import plain
import ranked
import runs
import tiny_flux
from bifrost.recipes import load_recipe
from bifrost.trainer.inference.mllm import load_mllm
from bifrost.trainer.stages import open_patch_latents, unsharded
from bifrost.trainer.stages.precompute import encode
from bifrost.trainer.stages.unsharded import offload

CPU = torch.device("cpu"), torch.float32
REPLICATED = "flux.placement={transformer: replicated, vae: replicated, text: replicated, vision_encoder: replicated}"
OFFLOADED = "flux.placement={transformer: replicated, vae: offloaded, text: offloaded, vision_encoder: offloaded}"


def train(shards: Path, flux: Path, runs_dir: Path, *settings: str) -> list[float]:
    whole = (f"flux.path={flux}", "micro_batch=4", "optimizer.lr=3e-3", "activation_checkpointing=true", *settings)
    ended = ranked.bifrost(2, *runs.arguments(shards, runs_dir, *whole, recipe="tiny-controlnet"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return runs.losses(runs_dir / "tiny-controlnet")


@pytest.mark.multi
def test_placements_have_the_same_curve_and_a_run_resumes_with_another(shards: Path, tmp_path: Path) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    wanted = train(shards, flux, tmp_path / "sharded", "steps=5")
    train(shards, flux, tmp_path / "moved", "steps=3", REPLICATED)
    moved = train(shards, flux, tmp_path / "moved", "steps=5", OFFLOADED)
    assert len(set(wanted)) == 5, "the ControlNet learns"
    np.testing.assert_allclose(moved, wanted, rtol=1e-6)


@pytest.mark.multi
def test_stage_1_trains_alike_with_replicated_and_cached_frozen_parts(shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(shards, tmp_path / "data"))
    cached = "backbone.vision_encoder=cached"

    def train(steps: int, placement: str, *more: str) -> None:
        settings = (f"steps={steps}", f"backbone.placement={placement}", *more)
        ended = ranked.bifrost(2, *runs.arguments(shards, tmp_path, *settings))
        assert [rank.code for rank in ended] == [0, 0], ended[0].err
        assert "frozen parameters" in ended[0].out and " 0 frozen" not in ended[0].out

    wanted = plain.losses(load_recipe("tiny-mllm", [*runs.arguments(shards, tmp_path, "steps=6")[2:]]))
    train(3, "replicated")
    train(5, "sharded")
    recipe = load_recipe("tiny-mllm", runs.arguments(shards, tmp_path, cached)[2:])
    encode(open_patch_latents(recipe).outputs(), recipe.data, None, recipe.micro_batch)
    train(6, "replicated", cached)
    run = tmp_path / "tiny-mllm"
    np.testing.assert_allclose(runs.losses(run), wanted, rtol=1e-5)
    # A model loaded from the run has all frozen parts, wherever they were in training.
    stage = open_patch_latents(load_recipe(run / "recipe.yaml"))
    whole, cut = (
        load_mllm(run, open_patch_latents(load_recipe(run / "recipe.yaml", [f"backbone.placement={place}"])), *CPU)
        for place in ("replicated", "sharded")
    )
    assert (
        stage.backbone.placement == "replicated" and stage.outputs() and "backbone" not in dict(whole.named_modules())
    )
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    assert torch.equal(whole.backbone.patch_latents(images), cut.backbone.patch_latents(images))
    for name, weight in whole.trainable().items():
        assert torch.equal(weight, cut.trainable()[name]), name


class Probe(nn.Linear):
    seen: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.weight.data
        if len(x) == 0:
            raise ValueError
        return super().forward(x)


def test_offloaded_parameters_are_on_the_device_only_during_the_call() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = Probe(3, 3, bias=False)
    module = nn.Sequential(probe)
    wanted = module(torch.ones(2, 3))
    offload(module, device)
    home = probe.weight.data_ptr()
    for rows in (2, 2, 0):
        x = torch.ones(rows, 3, device=device)
        if rows:
            torch.testing.assert_close(module(x).cpu(), wanted)
        else:
            with pytest.raises(ValueError):  # a failure leaves nothing on the device either
                module(x)
        assert probe.seen.device.type == device.type and probe.seen.data_ptr() != home
        assert probe.weight.device.type == "cpu" and probe.weight.data_ptr() == home


def test_offloaded_parameters_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory comes in powers of two: many parameters in one block, none across two, and one larger than a block
    in its own."""
    monkeypatch.setattr(unsharded, "BLOCK", 4096)
    shapes = {"a": (100,), "b": (30, 10), "large": (70, 40), "c": (), "d": (300,), "e": (512,)}
    kinds = {"b": torch.bfloat16, "d": torch.int8}
    values = {name: torch.randint(-9, 9, shape).to(kinds.get(name, torch.float32)) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(value.clone(), requires_grad=False) for name, value in values.items()}
    blocks: list[torch.Tensor] = []

    def allocate(size: int) -> torch.Tensor:
        blocks.append(torch.full((size,), 255, dtype=torch.uint8))
        return blocks[-1]

    unsharded.move_to_blocks(list(parameters.values()), allocate)
    homes = [parameter.untyped_storage().data_ptr() for parameter in parameters.values()]
    assert [homes.index(home) for home in homes] == [0, 0, 2, 3, 3, 3]
    assert [len(block) for block in blocks] == [1536, 11264, 512 + 512 + 2048]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, values[name]) and parameter.dtype == values[name].dtype, name
        assert parameter.data_ptr() % 16 == 0 and not parameter.requires_grad
    unsharded.move_to_blocks([], allocate)
    assert len(blocks) == 3
