#!/usr/bin/env bash
# DeepSpeed 0.19.8: ZeRO-3 updates parameters that a step does not use with their gradients of an earlier step.
#
# A model has a part that only some batches reach: the image branch of a mixture of texts and images, an expert, a head.
# Stage 3 keeps the gradients in one buffer, which it never clears: the first micro-batch of a step overwrites only the
# gradients that it has, and a later one adds to what it finds.
#
# Expected: a part that no micro-batch of a step used has no gradient, as with stages 0 to 2 and in plain PyTorch.
# Actual: it moves by its last gradient in every such step. If only the second of two micro-batches uses it, it moves by
# that gradient and, once more, the one of the step before: 1.5 times a full step, not half of one. The gradient norm
# contains the old gradients too. Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8 torch==2.13.0 setuptools==80.9.0 \
  ninja==1.13.0
cd "$folder"

export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29513 DS_ACCELERATOR=cpu
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PYTHON'
import deepspeed
import torch
from torch import nn

deepspeed.init_distributed("gloo", verbose=False)
STEPS = [(True, True), (False, True), (False, False), (False, False)]
"""Two micro-batches per step; whether each of them has images."""


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = nn.Linear(4, 1, bias=False)
        self.image = nn.Linear(4, 1, bias=False)

    def forward(self, inputs, images):
        loss = self.text(inputs).mean()
        return loss + self.image(inputs).mean() if images else loss


def moved(stage):
    """How far an element of the image branch moves in each step; its gradient is 1 wherever the branch is used."""
    model = Mixed()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config
    )

    def element():
        with deepspeed.zero.GatheredParameters([model.image.weight]):
            return model.image.weight[0, 0].item()

    values = [element()]
    for step in STEPS:
        for images in step:
            engine.backward(engine(torch.ones(1, 4), images))
            engine.step()
        values.append(element())
    return [round(before - after, 3) for before, after in zip(values, values[1:])]


found = {stage: moved(stage) for stage in (0, 2, 3)}
for stage, steps in found.items():
    print(f"stage {stage}: the image branch, used by 2, 1, 0 and 0 of 2 micro-batches, moves by {steps}")
right = [1.0, 0.5, 0.0, 0.0]
raise SystemExit(found != {0: right, 2: right, 3: [1.0, 1.5, 1.5, 1.5]})
PYTHON
