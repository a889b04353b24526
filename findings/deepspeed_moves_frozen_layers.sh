#!/usr/bin/env bash
# DeepSpeed 0.19.8: a layer that is frozen during training continues to change, with every ZeRO stage.
#
# A usual schedule trains a connector first and then freezes it by requires_grad_(False), or freezes layer after layer.
# In plain PyTorch such a parameter has no gradient from then on, and an optimizer skips it. ZeRO's optimizer has flat
# buffers that still contain the layer, with a gradient of zero: AdamW's momentum and weight decay still change it.
#
# Expected: a frozen layer keeps its weights to the bit, as in plain PyTorch. Actual: with stages 1, 2 and 3 and AdamW
# without weight decay it moves in every further step, in the first one by two thirds of the step before. Exits 0 while
# the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 setuptools==80.9.0 \
  ninja==1.13.0
cd "$folder"

export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29514 DS_ACCELERATOR=cpu
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON'
import deepspeed
import torch
from torch import nn

deepspeed.init_distributed("gloo", verbose=False)
INPUTS = torch.ones(1, 4)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)


def moved(element, train, model):
    """How far an element of the first layer moves in a step, and in three more steps after the layer was frozen."""
    values = [element()]
    for step in range(4):
        if step == 1:
            model[0].weight.requires_grad_(False)
        train()
        values.append(element())
    return [round(abs(after - before), 3) for before, after in zip(values, values[1:])]


def plainly():
    model, optimizer = build()

    def train():
        optimizer.zero_grad()
        model(INPUTS).sum().backward()
        optimizer.step()

    return moved(lambda: model[0].weight[0, 0].item(), train, model)


def with_deepspeed(stage):
    model, optimizer = build()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def train():
        engine.backward(engine(INPUTS).sum())
        engine.step()

    def element():
        with deepspeed.zero.GatheredParameters([model[0].weight]):
            return model[0].weight[0, 0].item()

    return moved(element, train, model)


found = {"plain PyTorch": plainly(), **{f"stage {stage}": with_deepspeed(stage) for stage in (1, 2, 3)}}
for what, steps in found.items():
    print(f"{what}: a layer that is frozen after the first of four steps moves by {steps}")
still, *others = found.values()
raise SystemExit(still != [0.1, 0.0, 0.0, 0.0] or any(steps[0] != 0.1 or min(steps[1:]) < 0.03 for steps in others))
PYTHON
