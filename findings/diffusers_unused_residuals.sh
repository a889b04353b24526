#!/usr/bin/env bash
# diffusers 0.42.1: FLUX's transformer ignores some of a ControlNet's residuals, without a word.
#
# FluxTransformer2DModel spreads n ControlNet residuals over its b blocks: residual number block // ceil(b / n) is added
# after every block. If ceil(b / n) does not fit, the last ones are never reached. A ControlNet with 18 double blocks on
# FLUX.1's 19 trains 10 of them; the other 8 cost time and memory and get no gradient.
#
# Expected: every residual that is passed is added somewhere, or an error. Actual: 6 of 6 become 5, 9 become 7,
# 12 and 18 become 10. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.13.0 transformers==5.23.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import FluxTransformer2DModel

flux = FluxTransformer2DModel(
    in_channels=4,
    num_layers=19,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=8,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 6, 6),
)
inputs = {
    "hidden_states": torch.randn(1, 4, 4),
    "encoder_hidden_states": torch.randn(1, 3, 8),
    "pooled_projections": torch.randn(1, 8),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(4, 3),
    "txt_ids": torch.zeros(3, 3),
    "return_dict": False,
}


def added(count):
    """Residuals of `count` that get a gradient."""
    residuals = [torch.zeros(1, 4, 32, requires_grad=True) for _ in range(count)]
    flux(**inputs, controlnet_block_samples=residuals)[0].sum().backward()
    return sum(each.grad is not None and bool(each.grad.any()) for each in residuals)


found = {count: added(count) for count in (4, 6, 7, 9, 12, 18, 19)}
for count, used in found.items():
    print(f"{count} residuals for 19 blocks: {used} added")
raise SystemExit(found != {4: 4, 6: 5, 7: 7, 9: 7, 12: 10, 18: 10, 19: 19})
PYTHON
