"""For the same gradients an optimizer makes its library's weights to the bit, on any number of ranks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import opened
import plain
import ranked
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.optim import optimizers
from bifrost.trainer.stages import StageModel

STEPS = 6
SHAPES = {
    "mask_token": (1, 1, 48),
    "layers.0.up": (64, 48),
    "layers.0.down": (48, 64),
    "layers.0.norm": (48,),
    "layers.1.up": (31, 17),
    "layers.1.down": (17, 31),
    "layers.1.gate": (3, 200),
    "layers.1.wide": (72, 64),
    "layers.1.long": (17, 256),
    "head": (5, 48),
    "bias": (5,),
}
"""On 4 ranks some slices are padded, and the last ones of the bias are empty."""
SETTINGS = {
    "adamw": (),
    "lion": ("optimizer.name=lion", "optimizer.betas=[0.9, 0.99]"),
    "muon": ("optimizer.name=muon", "optimizer.momentum=0.8"),
    "adamw-8bit": ("optimizer.name=adamw-8bit",),
}

MATRICES = ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "layers.1.gate")
MATRICES += ("layers.1.wide", "layers.1.long")
ROUNDING = 1e-6
"""Relative, of AdamW: torch's kernel for CPUs rounds the last elements of a tensor in another way than the others."""


class Part(nn.Module):
    """Parameters whose gradients do not depend on them, and are exact: their sums over ranks too."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        for name, shape in SHAPES.items():
            outer, _, own = name.rpartition(".")
            if outer == prefix:
                self.register_parameter(own, nn.Parameter(torch.empty(shape)))

    def forward(self, step: int) -> Tensor:
        outer = f"{self.prefix}." if self.prefix else ""
        products = [(p * gradient(outer + name, step)).sum() for name, p in self.named_parameters(recurse=False)]
        return torch.stack(products).sum()


class Weights(StageModel, Part):
    def __init__(self) -> None:
        Part.__init__(self, "")
        self.layers = nn.ModuleList(Part(f"layers.{number}") for number in range(2))

    def forward(self, step: int) -> Tensor:
        return torch.stack([Part.forward(self, step), *(layer(step) for layer in self.layers)]).sum()


def drawn(name: str, step: int) -> Tensor:
    """Normal numbers of 8 bits."""
    generator = torch.Generator().manual_seed(100 * list(SHAPES).index(name) + step)
    return torch.randn(SHAPES[name], generator=generator).bfloat16().float()


def gradient(name: str, step: int) -> Tensor:
    return drawn(name, step) / 8


def recipe(name: str, ranks: int) -> Recipe:
    settings = ("precision=fp32", f"global_batch={ranks}", "micro_batch=1", "optimizer.clip=1e9")
    return load_recipe("tiny-mllm", [*settings, "optimizer.lr=0.01", "optimizer.weight_decay=0.3", *SETTINGS[name]])


def trained(name: str, ranks: int) -> dict[str, dict[str, list[float]]]:
    """After all steps: slot of a checkpoint -> name of a parameter -> its elements on this rank, without padding."""
    from bifrost.trainer.checkpoint.state import capture
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.optim.engine import Engine, partitioned

    joined = join()
    config = opened.deepspeed(recipe(name, ranks), ranks)
    with partitioned(config, joined.device):
        model = Weights()
    for parameter_name, parameter in model.named_parameters():
        own = parameter.ds_tensor
        whole = torch.nn.functional.pad(drawn(parameter_name, 99).flatten(), (0, own.numel() * ranks))
        own.data.copy_(whole[joined.rank * own.numel() :][: own.numel()])
    engine = Engine(model, recipe(name, ranks).optimizer, config, joined)
    for step in range(STEPS):
        engine.backward(engine.forward({"step": step}))
        assert engine.step(0.01 / (1 + step), skip=False)
    assert engine.updates == STEPS
    slots = capture(engine, None)[0]
    if name == "adamw-8bit":
        held = [tensor for each in engine.deepspeed.optimizer.optimizer.slices() for tensor in each.tensors()]
        before = [tensor.clone() for tensor in held]
        engine.restored = {slot: {key: own.clone() for key, own in slots[slot].items()} for slot in list(slots)[1:]}
        for each in engine.deepspeed.optimizer.optimizer.slices():
            for kind, scales in each.scales.items():
                scales.zero_()
                each.moments[kind].zero_()
        engine.adopt()
        assert all(map(torch.equal, held, before)), "other codes or scales than before"
    return {slot: {key: own.tolist() for key, own in held.items()} for slot, held in slots.items()}


@functools.cache
def elements(name: str, ranks: int) -> dict[str, dict[str, Tensor]]:
    """The same of whole parameters."""
    ended = ranked.run(trained, ranks, name, ranks)
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return {
        slot: {key: torch.tensor([each for rank in ended for each in rank.value[slot][key]]) for key in held}
        for slot, held in ended[0].value.items()
    }


@functools.cache
def wanted(name: str) -> dict[str, Tensor]:
    """The weights of the library in this process."""
    model = Weights()
    for parameter_name, parameter in model.named_parameters():
        parameter.data.copy_(drawn(parameter_name, 99))
    optimizers = plain.library(recipe(name, 1).optimizer, model)
    for step in range(STEPS):
        for parameter_name, parameter in model.named_parameters():
            parameter.grad = gradient(parameter_name, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_equal_those_of_the_library(name: str, ranks: int) -> None:
    for parameter, expected in wanted(name).items():
        found = elements(name, ranks)["master"][parameter]
        exact = name == "lion" or (name == "muon" and parameter in MATRICES)
        torch.testing.assert_close(found, expected.flatten(), rtol=0 if exact else ROUNDING, atol=0, msg=parameter)


@pytest.mark.multi
@pytest.mark.parametrize("ranks", [2, 4])
def test_blocks_in_8_bits_that_ranks_share_are_those_of_one_rank(ranks: int) -> None:
    alone = elements("adamw-8bit", 1)
    for slot, held in elements("adamw-8bit", ranks).items():
        for parameter, found in held.items():
            assert torch.equal(found, alone[slot][parameter]), (slot, parameter)
    different = {key: found.unique().numel() / found.numel() for key, found in alone["exp_avg"].items()}
    assert different["layers.1.wide"] < 0.7, "in 8 bits"
    assert different["layers.0.up"] > 0.9, "too small"


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "version", lambda package: "1" if package == "torch" else None)
    optimizers.require_optimizer(recipe("adamw", 1).optimizer)
    for name, package in (("lion", "lion-pytorch"), ("adamw-8bit", "torchao")):
        with pytest.raises(RunError, match=rf"name={name}: {package} is not installed: pip install '{package}>=0"):
            optimizers.require_optimizer(recipe(name, 1).optimizer)
