#!/usr/bin/env bash
# DeepSpeed 0.19.8: after deepspeed.zero.Init, frozen linear layers of any model in the process keep their inputs.
#
# ZeRO-3's context replaces torch.nn.functional.linear by its own function (`memory_efficient_linear`, on by default)
# and does not restore it. That function always saves the input for the gradient of the weight; torch's own saves it
# only if the weight needs a gradient. A frozen model through which gradients flow, such as a diffusion model under an
# adapter, then keeps one activation more per linear layer, also when it was never part of the context.
#
# Expected: models outside `with zero.Init():` keep what they kept before it; four frozen layers keep nothing. Actual:
# each keeps its input. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 setuptools==80.9.0 \
  ninja==1.13.0
cd "$folder"

export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 DS_ACCELERATOR=cpu
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON'
import deepspeed
import torch
from torch import nn

LAYERS, WIDTH, TOKENS = 4, 64, 8
deepspeed.init_distributed("gloo", verbose=False)
inputs = torch.randn(TOKENS, WIDTH, requires_grad=True)


def kept():
    """Values that a frozen model's backward pass keeps, without its weights."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found = {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs)
    return sum(found.values())


before = kept()
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
    pass
after = kept()
print(f"kept by a frozen model outside of zero.Init: {before} values before it, {after} after it")
raise SystemExit((before, after) != (0, LAYERS * TOKENS * WIDTH))
PYTHON
