"""Quantized checkpoints: read as the library that made them reads them, to the bit, or refused by name; never as plain.

The fixtures and what is expected of them come from the libraries (tests/support/make_quantized.py).
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bifrost.trainer.errors import RunError
from bifrost.trainer.models.weights import WeightFiles, fill

FIXTURES = Path(__file__).parents[2] / "fixtures" / "quantized"
SCHEMES = sorted(folder.name for folder in FIXTURES.iterdir())


@pytest.fixture(params=SCHEMES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def configure(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_weight_equals_the_librarys_to_the_bit(folder: Path) -> None:
    files, expected = WeightFiles(folder), load_file(folder / "expected.safetensors")
    files.require(expected)
    assert {"model.layers.0.self_attn.k_proj.weight", "visual.blocks.0.attn.qkv.weight"} <= set(files.names)
    assert not [name for name in files.names if "scale" in name or "SCB" in name or "format" in name]
    for name, wanted in expected.items():
        assert files.shape(name) == wanted.shape
        assert torch.equal(files.full(name).to(torch.bfloat16), wanted), name
    parameters = {
        name: nn.Parameter(torch.empty_like(wanted), requires_grad=False) for name, wanted in expected.items()
    }
    fill(parameters, files, folder)
    assert all(torch.equal(parameters[name], wanted) for name, wanted in expected.items())


def test_each_rank_reads_its_own_slice(folder: Path) -> None:
    files, name = WeightFiles(folder), "visual.blocks.0.attn.qkv.weight"
    whole = files.full(name).flatten()
    for ranks in (1, 3, 7, 100):  # within a row, across rows, and numbers that do not divide
        size = -(-len(whole) // ranks)
        parts = [files.flat(name, min(lo, 3072), min(lo + size, 3072)) for lo in range(0, ranks * size, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert len(files.flat(name, 3072, 3072)) == 0


def test_a_config_that_lost_its_key_is_refused(folder: Path) -> None:
    configure(folder, model_type="qwen2_5_vl")
    with pytest.raises(RunError, match=r"quantized by .*config\.json has no quantization_config"):
        WeightFiles(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match="quantized by"):
        WeightFiles(folder)


def test_the_key_of_a_sub_model_counts(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    wanted = load_file(folder / "expected.safetensors")["visual.blocks.0.attn.qkv.weight"]
    configure(folder, model_type="qwen2_5_vl", text_config=settings)
    assert torch.equal(WeightFiles(folder).full("visual.blocks.0.attn.qkv.weight").bfloat16(), wanted)


def test_the_content_hash_covers_the_scales(folder: Path) -> None:
    name = "visual.blocks.0.attn.qkv.weight"
    before = WeightFiles(folder).content_hash([name])
    tensors = load_file(folder / "model.safetensors")
    (scale,) = (n for n in tensors if n.startswith("visual.blocks.0.attn.qkv") and n.endswith(("scale", "SCB")))
    tensors[scale].view(-1)[0] *= 2
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    save_file(tensors, folder / "model.safetensors", about)
    assert WeightFiles(folder).content_hash([name]) != before


def test_a_missing_scale_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    lost = [n for n in tensors if n.startswith("visual.blocks.0.attn.qkv") and n.endswith(("scale", "SCB"))]
    with safe_open(FIXTURES / folder.name / "model.safetensors", "pt") as file:
        about = file.metadata()
    save_file({n: t for n, t in tensors.items() if n not in lost}, folder / "model.safetensors", about)
    with pytest.raises(RunError, match=r"qkv\.weight .*(missing|without scales)"):
        WeightFiles(folder).require(["visual.blocks.0.attn.qkv.weight"])


REFUSED: dict[str, dict[str, Any]] = {
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "HQQ": {"quant_method": "hqq"},
    "MXFP4": {"quant_method": "mxfp4"},
    "GGUF": {"quant_method": "gguf"},
    "block-wise fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "torchao Float8WeightOnlyConfig": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}},
    },
    "a_new_one": {"quant_method": "a_new_one"},
    "compressed-tensors int4 per group": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
    },
    "compressed-tensors with transform_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}},
        "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
    },
}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_schemes_are_refused_by_name(tmp_path: Path, name: str, key: str) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    configure(tmp_path, **{key: REFUSED[name]})
    with pytest.raises(RunError, match=f"{name}.*unquantized"):
        WeightFiles(tmp_path)
    configure(tmp_path, vision_config={key: REFUSED[name]})
    with pytest.raises(RunError, match=name):
        WeightFiles(tmp_path)


TRACES = {
    "GPTQ or AWQ": {"l.qweight": torch.int32, "l.qzeros": torch.int32, "l.scales": torch.float16},
    "block-wise fp8": {"l.weight": torch.float8_e4m3fn, "l.weight_scale_inv": torch.float32},
    "bitsandbytes nf4": {"l.weight": torch.uint8, "l.weight.absmax": torch.float32},
    "bitsandbytes int8": {"l.weight": torch.int8, "l.SCB": torch.float32},
    "fp8": {"l.weight": torch.float8_e4m3fn, "l.weight_scale": torch.float32},
    "torchao": {"l._weight_qdata": torch.int8, "l._weight_scale": torch.float32},
    "scaled fp8": {"l.weight": torch.float8_e4m3fn, "l.scale_weight": torch.float32},
    "HQQ": {"l.W_q": torch.uint8},
}


@pytest.mark.parametrize("name", TRACES)
def test_a_scheme_is_detected_from_tensors_alone(tmp_path: Path, name: str) -> None:
    tensors = {
        key: torch.zeros(2, 2, dtype=torch.uint8).repeat(1, 4).view(dtype) for key, dtype in TRACES[name].items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=f"quantized by .*{name}.*unquantized"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]
)
def test_a_parameter_that_is_not_a_float_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """A model cast to fp8, or one whose scales are lost: its values are meaningless."""
    save_file({"weight": torch.zeros(2, 2, dtype=torch.uint8).to(dtype)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    parameter = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RunError, match=r"weight is stored as \w+, without scales"):
        fill({"weight": parameter}, files, tmp_path)
    with pytest.raises(RunError, match="weight is stored as"):
        files.require(["weight"])
    counter = torch.tensor([1, 1])
    save_file({"weight": torch.tensor([7, 7])}, tmp_path / "model.safetensors")
    fill({"weight": counter}, WeightFiles(tmp_path), tmp_path)  # type: ignore[dict-item]  # a buffer that counts
    assert counter.tolist() == [7, 7]


UNKNOWN = (
    "model.layers.0.mlp.up_proj.scale",
    "model.layers.0.mlp.up_proj.weight_amax",
    "model.layers.0.mlp.up_proj._amax",
    "model.layers.0.mlp.up_proj.input_scale_inv",
    "model.layers.0.mlp.up_proj.weight.factor",
    "model.layers.0.mlp.up_proj.weight_quantizer._amax",
    "model.layers.0.mlp.up_proj.lora_A.default.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.layers.0.mlp.up_proj_scale",
    "model.layers.0.mlp.smooth",
    "x_embedder_scale",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_next_to_a_weight_that_nothing_reads_is_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weights = {each: torch.ones(2, 2).to(dtype) for each in ("model.layers.0.mlp.up_proj.weight", "x_embedder.weight")}
    save_file({**weights, name: torch.full((1,), 3e-3)}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    parameters = {each: nn.Parameter(torch.zeros(2, 2), requires_grad=False) for each in weights}
    wanted = re.escape(name) + ".*next to .*weight, .*unquantized" if dtype is torch.bfloat16 else "stored (as|next to)"
    for read in (lambda: files.require(weights), lambda: fill(parameters, files, tmp_path)):
        with pytest.raises(RunError, match=wanted):
            read()
    assert not any(parameter.any() for parameter in parameters.values())


HARMLESS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq",  # Llama and Qwen of older transformers
    "visual.rotary_pos_emb.inv_freq",
    "lm_head.weight",
    "text_model.embeddings.position_ids",  # CLIP: in the hub's clip-vit-large-patch14
    "logit_scale",
    "text_projection.weight",
    "vision_model.embeddings.class_embedding",
    "encoder.embed_tokens.weight",  # T5: its table, stored twice
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    "model.layers.0.mlp.up_proj.input_scale",  # of activations
)


def test_harmless_tensors_of_real_checkpoints_are_accepted(tmp_path: Path) -> None:
    read = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "visual.patch_embed.proj.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.final_layer_norm.weight",
        "shared.weight",
        "mask_token",
    )
    tensors = {name: torch.ones(2, 2) for name in (*read, *HARMLESS, "learnable_pos_emb")}
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    files.require(read)
    fill({name: nn.Parameter(torch.zeros(2, 2), requires_grad=False) for name in read}, files, tmp_path)


def test_a_scale_that_a_known_scheme_has_not_is_refused(folder: Path) -> None:
    tensors, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    extra = {"visual.blocks.0.attn.qkv.second_scale": torch.ones(1)}
    save_file({**tensors, **extra}, folder / "model.safetensors", about)
    with pytest.raises(RunError, match=r"qkv\.second_scale is stored next to"):
        WeightFiles(folder).require(expected)


def test_scales_of_activations_change_no_weight(tmp_path: Path) -> None:
    tensors = {"l.weight": torch.ones(2, 2), "l.input_scale": torch.ones(1), "attn.k_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(WeightFiles(tmp_path).full("l.weight"), torch.ones(2, 2))


def test_the_installed_libraries_agree(tmp_path: Path) -> None:
    """Against the libraries themselves, if installed: other shapes, and scales of other types."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="optional package bitsandbytes is not installed")
    weight = torch.randn(5, 12)
    data, scale, _ = functional.int8_vectorwise_quant(weight.half())
    save_file({"l.weight": data, "l.SCB": scale}, tmp_path / "model.safetensors")
    configure(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert torch.equal(WeightFiles(tmp_path).full("l.weight"), functional.int8_vectorwise_dequant(data, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_the_installed_compressed_tensors_agrees(tmp_path: Path, strategy: str, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
    scale = (torch.rand(5, 1) if strategy == "channel" else torch.rand(1)).to(dtype)
    data = torch.randn(5, 12).to(torch.float8_e4m3fn)
    save_file({"l.weight": data, "l.weight_scale": scale}, tmp_path / "model.safetensors")
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": strategy}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}
    configure(tmp_path, quantization_config=settings)
    assert torch.equal(WeightFiles(tmp_path).full("l.weight"), dequantize(data, scale, None, args))
