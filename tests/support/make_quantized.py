"""Write tests/fixtures/quantized with the library of each scheme: a few tensors of a small Qwen2.5-VL, and the weights
that the library itself reads from them.

    pip install torchao==0.18.0 bitsandbytes==0.50.2 compressed-tensors==0.20.1 accelerate loguru
    PYTHONPATH=tests/support python tests/support/make_quantized.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration, TorchAoConfig

import small_model

FOLDER = Path(__file__).parents[1] / "fixtures" / "quantized"
KEPT = ("layers.0.self_attn.k_proj.", "visual.blocks.0.attn.qkv.", "norm.weight")
SCHEMES = ("compressed-tensors-channel", "compressed-tensors-tensor", "bitsandbytes-int8", "torchao-int8")


def save(scheme: str, base: Path, out: Path) -> None:
    """Quantize the model of `base` and save it, with the scheme's library."""
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    if scheme == "bitsandbytes-int8":
        load(base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(out)
    elif scheme == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
        load(base, dtype=torch.bfloat16, quantization_config=settings).save_pretrained(out)
    else:
        _save_compressed(load(base, dtype=torch.bfloat16), scheme.rpartition("-")[2], out)


def _save_compressed(model: Any, strategy: str, out: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            highest = module.weight.abs().amax(1, keepdim=True) if strategy == "channel" else module.weight.abs().max()
            module.weight_scale.data.copy_(highest.float() / 448)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight in `folder` as the scheme's library loads it into a bf16 model, by transformers' names."""
    config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {}
    if config["quantization_config"]["quant_method"] == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, **settings)
    if config["quantization_config"]["quant_method"] == "bitsandbytes":
        model = model.dequantize()
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.data
        value = value.dequantize() if type(value) is not torch.Tensor else value
        found[name] = value.to(torch.bfloat16).contiguous()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        base = small_model.save(Path(place) / "base")
        for scheme in SCHEMES:
            whole, out = Path(place) / scheme, FOLDER / scheme
            save(scheme, base, whole)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            with safe_open(whole / "model.safetensors", "pt") as file:
                names = set(file.keys())
                kept = {n: file.get_tensor(n) for n in sorted(names) if any(part in n for part in KEPT)}
                save_file(kept, out / "model.safetensors", file.metadata())
            about = json.loads((whole / "config.json").read_text())
            (out / "config.json").write_text(
                json.dumps({"quantization_config": about["quantization_config"]}, indent=1)
            )
            expected = {}
            for name, value in dequantized(whole).items():
                hub = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
                if any(part in hub for part in KEPT):
                    expected[hub] = value
            save_file(expected, out / "expected.safetensors")


if __name__ == "__main__":
    sys.exit(main())
