"""A backbone with random weights in Qwen2.5-VL's layout, so small that a run of two ranks takes a second."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bifrost.recipes import FOLDER


def save(folder: Path) -> Path:
    """Save a model with one layer of width 32 in text model and vision encoder, and the tiny foundation's tokenizer."""
    if folder.is_dir():
        return folder
    shutil.copytree(FOLDER / "foundations" / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    small = {"hidden_size": 32, "intermediate_size": 32}
    text = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["full_attention"],
    }
    config["text_config"].update(small, **text)
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    config["vision_config"].update(small, depth=1, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0])
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def settings(folder: Path) -> tuple[str, str]:
    """Save the model to `folder`; returns the overrides that train it."""
    return f"backbone.path={save(folder)}", "data.image_size=56"


@functools.cache
def shared() -> Path:
    """The model in a folder for every test of this process to read."""
    folder = tempfile.mkdtemp(prefix="small-model-")
    atexit.register(shutil.rmtree, folder)
    return save(Path(folder) / "backbone")
