"""The engine's guard: a DeepSpeed that would train wrongly is refused by name."""

import importlib.metadata

import pytest
import torch

import opened
from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.optim.engine import import_deepspeed
from bifrost.trainer.optim.optimizers import parameter_groups
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.2")
    with pytest.raises(RunError, match=r"deepspeed 0\.19\.2 is installed, 0\.19\.8 or newer"):
        import_deepspeed(torch.device("cpu"))


def test_norms_biases_mask_token_and_table_do_not_decay() -> None:
    recipe = load_recipe("tiny-mllm", ["optimizer.weight_decay=0.3", "branch.positions=learned"])
    with torch.device("meta"):
        model = PatchLatentModel(read_config(locate("builtin:tiny")), recipe.branch, recipe.data.image_size)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, keep = parameter_groups(model, recipe.optimizer)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    kept = {names[id(p)] for p in keep["params"]}
    assert kept == {
        name
        for name in model.trainable()
        if name.endswith(("norm.weight", "layernorm.weight", "bias", "mask_token", "positions"))
    }
    assert len(kept) + len(decay["params"]) == len(model.trainable())


def test_muon_takes_the_matrices_of_the_layers() -> None:
    recipe = load_recipe("tiny-mllm", ["optimizer.name=muon", "optimizer.weight_decay=0.3"])
    with torch.device("meta"):
        model = PatchLatentModel(read_config(locate("builtin:tiny")), recipe.branch, recipe.data.image_size)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, decay, keep = parameter_groups(model, recipe.optimizer)
    assert [(group["rule"], group["weight_decay"]) for group in (muon, decay, keep)] == [
        ("muon", 0.3),
        ("adamw", 0.3),
        ("adamw", 0.0),
    ]
    assert {names[id(p)] for p in muon["params"]} == {name for name in model.trainable() if "_proj.weight" in name}
    assert [names[id(p)] for p in decay["params"]] == ["head.weight"]
    assert sum(len(group["params"]) for group in (muon, decay, keep)) == len(model.trainable())
    # The others keep their two groups.
    lion = recipe.optimizer.model_copy(update={"name": "lion"})
    assert [group["rule"] for group in parameter_groups(model, lion)] == ["lion", "lion"]


def test_a_model_without_layers_is_refused() -> None:
    model = torch.nn.Linear(3, 3)
    with pytest.raises(
        RunError, match=r"^optimizer\.name=muon: no trained matrix is in a repeated layer; set optimizer"
    ):
        parameter_groups(model, load_recipe("tiny-mllm", ["optimizer.name=muon"]).optimizer)


def test_deepspeed_gets_what_the_recipe_says() -> None:
    recipe = load_recipe("mllm-7b", ["optimizer.clip=0.7", "zero.persistence_threshold=5"])
    config = opened.deepspeed(recipe, 32)
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 5
    assert config["zero_optimization"]["overlap_comm"] is False
