#!/usr/bin/env bash
# transformers 5.23.0: Qwen2.5-VL's rotary positions hardly distinguish neighbouring columns of an image.
#
# Each of the 64 pairs of a head turns by its own frequency times a position: of time, row or column (mrope_section
# 16, 24, 24). The sections are cut from the sorted frequencies: the slowest 24 pairs are the columns'.
#
# Expected: a step to the right changes the rotation as much as a step down. Actual: a step down turns a pair by up to
# 0.0316 radians, a step to the right by up to 0.00018, 178 times less, and the last of 16 columns by 0.0027 against the
# first. A model that puts tokens of equal content on the grid, such as mask tokens, can hardly learn in which column they
# are. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

text = {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
rotary = Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLConfig(text_config=text).text_config)


def tables(row, column):
    position = torch.tensor([20, 20 + row, 20 + column]).view(3, 1, 1)
    cos, sin = rotary(torch.zeros(1), position)
    return cos[0, 0, :64], sin[0, 0, :64]


def turned(a, b):
    (cos_a, sin_a), (cos_b, sin_b) = ([x.double() for x in tables(*place)] for place in (a, b))
    return torch.atan2(sin_b * cos_a - cos_b * sin_a, cos_b * cos_a + sin_b * sin_a).abs().max().item()


down, right, across = turned((0, 0), (1, 0)), turned((0, 0), (0, 1)), turned((0, 0), (0, 15))
print(f"largest turn of a pair: {down:.4f} a row down, {right:.5f} a column to the right, {across:.4f} from column 0 to 15")
raise SystemExit(not (0.02 < down < 0.04 and right < 0.0002 and across < 0.004))
PYTHON
