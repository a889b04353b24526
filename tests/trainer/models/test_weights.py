"""Weights: read by slice, named as in the public release, identified by content."""

import pytest
import torch
from safetensors.torch import save_file

from bifrost.recipes import load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.backbone import read_config
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.weights import WeightFiles, backbone_names, fill, public_name
from bifrost.trainer.stages.patch_latent_model import PatchLatentModel


def test_public_names() -> None:
    for ours, theirs in {
        "branch.layers.3.self_attn.q_proj.bias": "model.layers.3.self_attn.vision_branch_q_proj.bias",
        "branch.layers.0.mlp.down_proj.weight": "model.layers.0.vision_branch_mlp.down_proj.weight",
        "branch.layers.11.input_layernorm.weight": "model.layers.11.vision_branch_input_layernorm.weight",
        "branch.norm.weight": "model.vision_branch_norm.weight",
    }.items():
        assert public_name(ours) == f"vision_language_model.{theirs}"
    assert public_name("branch.positions") == "learnable_pos_emb"
    assert public_name("head.weight") == "vision_head.weight"
    with pytest.raises(AssertionError):
        public_name("backbone.text.norm.weight")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "vision_language_model.model."])
def test_old_and_new_file_layouts(tmp_path, prefix: str) -> None:
    save_file({f"{prefix}norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert backbone_names("text", ["norm.weight"], files) == {"norm.weight": f"{prefix}norm.weight"}


def test_content_hash_sees_every_bit_and_no_rank(tmp_path) -> None:
    weights = {"a": torch.randn(7), "b": torch.randn(3, 2), "c": torch.randn(1)}
    save_file(weights, tmp_path / "one.safetensors")
    files = WeightFiles(tmp_path / "one.safetensors")
    alone = files.content_hash(files.names)
    parts: list = []
    for rank in range(3):
        files.content_hash(files.names, rank, 3, lambda part: parts.append(part) or [part])
    assert files.content_hash(files.names, 0, 3, lambda _: parts) == alone

    weights["b"].view(torch.int32)[2, 1] ^= 1
    save_file(weights, tmp_path / "two.safetensors")
    two = WeightFiles(tmp_path / "two.safetensors")
    assert two.content_hash(two.names) != alone
    assert two.content_hash(["a", "c"]) == files.content_hash(["a", "c"])


def test_missing_and_misshapen_tensors_are_named(tmp_path) -> None:
    folder, recipe = locate("builtin:tiny"), load_recipe("tiny-mllm")
    with torch.device("meta"):
        head = PatchLatentModel(read_config(folder), recipe.branch, recipe.data.image_size).head
    parameters = dict(head.to_empty(device="cpu").named_parameters())
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    files = WeightFiles(tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"w\.safetensors: 1 tensors are missing, bias"):
        fill(parameters, files, files.path)
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(192)}, tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"weight has shape \(2, 2\), expected \(192, 192\)"):
        fill(parameters, WeightFiles(tmp_path / "w.safetensors"), "somewhere")
    (tmp_path / "w.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(RunError, match="cannot be read as safetensors"):
        WeightFiles(tmp_path / "w.safetensors")
