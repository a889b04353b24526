"""Seconds of the optimizer's part of a step on a CPU: DeepSpeed ZeRO-3 as a run uses it, and diffusers' example.

    OMP_NUM_THREADS=1 .venv/bin/python docs/benchmarks/optimizer.py [--rounds 9]

One rank, the parameters of the tiny ControlNet and of one with 4 double and 8 single blocks of width 512, random
gradients. Ours: `Engine.grad_norm` and `Engine.step`: clipping, AdamW on fp32 masters, bf16 weights. The example:
`clip_grad_norm_`, `torch.optim.AdamW` as it is constructed there, `zero_grad`. Both take the same steps from the same
gradients, and their weights are compared. They alternate; the ratio is the median of the ratios per round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from diffusers import FluxControlNetModel
from torch import Tensor, nn

from bifrost.recipes import BatchSplit, load_recipe
from bifrost.recipes.schema import Zero
from bifrost.trainer.distributed.process_group import join
from bifrost.trainer.optim.deepspeed_config import deepspeed_config
from bifrost.trainer.optim.engine import Engine, import_deepspeed, partitioned
from bifrost.trainer.stages import Losses, StageModel

SIZES = {"tiny": (3, 1, 1), "mid": (8, 4, 8)}
"""Name -> heads of 64, double and single blocks."""
CLIP = 1.0


def shapes(heads: int, double: int, single: int) -> list[tuple[int, ...]]:
    """Of the parameters of a ControlNet."""
    with torch.device("meta"):
        model = FluxControlNetModel(
            in_channels=64,
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=64,
            joint_attention_dim=64 * heads,
            pooled_projection_dim=128,
            guidance_embeds=True,
            axes_dims_rope=[16, 24, 24],
        )
    return [tuple(parameter.shape) for parameter in model.parameters()]


class Weights(StageModel):
    """Parameters whose gradients are given."""

    def __init__(self, found: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in found)

    def forward(self, gradients: list[Tensor]) -> Losses:
        loss = sum(((w * g).sum() for w, g in zip(self.weights, gradients, strict=True)), torch.zeros(()))
        return Losses(loss.float(), torch.zeros(5), loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
    }
    ranks = join()
    import_deepspeed(ranks.device)
    config = deepspeed_config(BatchSplit(1, 1, 1), "bf16", Zero(), CLIP, on_cpu=True)
    settings = load_recipe("tiny-controlnet", []).optimizer
    print("| parameters | ours, ms | diffusers' example, ms | its time / ours | largest difference of the weights |")
    print("|---|---:|---:|---|---:|")
    for name, size in SIZES.items():
        found = shapes(*size)
        with partitioned(config, ranks.device):
            model = Weights(found)
        engine = Engine(model, settings, config, ranks)
        for master in engine.masters().values():
            master.normal_(std=0.02)
        theirs = [
            nn.Parameter(master.view(shape).clone())
            for master, shape in zip(engine.masters().values(), found, strict=True)
        ]
        rule = torch.optim.AdamW(
            theirs, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.eps
        )
        times: list[tuple[float, float]] = []
        for number in range(asked.rounds + 1):  # the first is not measured
            gradients = [1e-2 * torch.randn(shape).bfloat16() for shape in found]
            engine.backward(engine.forward({"gradients": gradients}).loss)
            begun = time.perf_counter()
            engine.grad_norm().item()
            engine.step(settings.lr, skip=False)
            ours = time.perf_counter() - begun
            for parameter, gradient in zip(theirs, gradients, strict=True):
                parameter.grad = gradient.float()
            begun = time.perf_counter()
            nn.utils.clip_grad_norm_(theirs, CLIP)
            rule.step()
            rule.zero_grad(set_to_none=True)
            times += [(ours, time.perf_counter() - begun)] if number else []
        ratios = [their / our for our, their in times]
        error = max(
            float((master - parameter.detach().flatten()).abs().max())
            for master, parameter in zip(engine.masters().values(), theirs, strict=True)
            if parameter.ndim > 1  # the example decays biases and norms too
        )
        medians = [f"{1e3 * statistics.median(column):.1f}" for column in zip(*times, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        millions = sum(torch.Size(shape).numel() for shape in found) / 1e6
        print(
            f"| {name}, {millions:.1f} M in {len(found)} | {' | '.join(medians)} | {ratio} | {error:.0e} |", flush=True
        )


if __name__ == "__main__":
    main()
