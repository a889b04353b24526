"""Flow matching for the tiny FLUX on frozen text encoders and frozen latents, resumable.

Legend: n scenes, B samples.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from flux_data import listed
from flux_model import Text, shifted, velocity
from flux_text import Encoders
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifrost.data.scenes.grammar import Scene

BATCH, LEARNING_RATE, WARMUP_STEPS, LEVEL_SHARE, FINAL_SHARE = 32, 2e-3, 50, 0.5, 0.03
TEXT_DROP, EMA_DECAY = 0.1, 0.998
TOP_SHARE, TOP_LEVELS = 0.25, 0.15
GUIDANCE_RANGE, GUIDANCE_STRENGTH = (1.0, 5.0), 0.2
SAVE_EVERY_S = 240.0


class Pool:
    """FLUX's training data: scenes with packed latents [n, 64, 64], and the frozen encoders of their captions, which
    are drawn again for every batch."""

    def __init__(self, encoders: Encoders, scenes: list[Scene], tokens: Tensor) -> None:
        self.encoders, self.scenes, self.tokens = encoders, scenes, tokens
        self.empty = encode_texts(encoders, [""])

    def batch(self, training: Training) -> tuple[Tensor, Text]:
        """Latents and texts of one batch, with a tenth of the texts dropped."""
        index = training.next_index(len(self.scenes)).tolist()
        draws = np.random.default_rng((training.seed, training.step))
        texts = [listed(self.scenes[i], draws)[0] if draws.random() > TEXT_DROP else "" for i in index]
        return self.tokens[index], encode_texts(self.encoders, texts)


@torch.no_grad()
def encode_texts(encoders: Encoders, texts: list[str]) -> Text:
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        parts = [texts[start : start + 128] for start in range(0, len(texts), 128)]
        return Text(
            torch.cat([encoders.pooled(p).float() for p in parts]),
            torch.cat([encoders.states(p).float() for p in parts]),
        )


class Training:
    """The state of a training: transformer, moving average, optimizers and position; saved and restored as a whole."""

    def __init__(self, model: FluxTransformer2DModel, seed: int, learning_rate: float = LEARNING_RATE) -> None:
        self.model, self.seed = model, seed
        self.learning_rate = learning_rate
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.draws = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.step = 0
        self.seconds = 0.0
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "transformer_blocks" in name]
        chosen = set(map(id, matrices))
        rest = [p for _, p in named if id(p) not in chosen]
        self.rules: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "rules": [rule.state_dict() for rule in self.rules],
            "draws": self.draws.get_state(),
            "order": self.order,
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for rule, values in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(values)
        self.draws.set_state(state["draws"])
        self.order, self.step, self.seconds = state["order"], state["step"], state["seconds"]

    def next_index(self, count: int) -> Tensor:
        """The indices of the next batch of `count` scenes; every epoch is shuffled."""
        if len(self.order) < BATCH:
            self.order = torch.randperm(count, generator=self.draws)
        index, self.order = self.order[:BATCH], self.order[BATCH:]
        return index

    def update(self, loss: Tensor, share: float) -> None:
        """One optimizer step at `share` of the learning rate, and an update of the moving average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for rule in self.rules:
            for group in rule.param_groups:
                group["lr"] = share * self.learning_rate
            rule.step()
            rule.zero_grad()
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1


def rate_at(step: int, steps: int) -> float:
    """Fraction of the learning rate: warmup, constant, then linear decay after LEVEL_SHARE of the steps."""
    late = max(0.0, step / steps - LEVEL_SHARE) / (1 - LEVEL_SHARE)
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - FINAL_SHARE) * late)


def flow_matching(training: Training, pool: Pool) -> Tensor:
    """Mean squared error of the velocity, at shifted logit-normal noise levels. The guidance is random, so that it has
    no effect until it is distilled."""
    clean, text = pool.batch(training)
    noisy, sigma, eps = noised(training, clean)
    return F.mse_loss(velocity(training.model, noisy, sigma, text, drawn_guidance(training)), eps - clean)


def drawn_guidance(training: Training) -> Tensor:
    low, high = GUIDANCE_RANGE
    return low + (high - low) * torch.rand(BATCH, generator=training.draws)


class GuidanceDistillation:
    """Distillation of the guidance embedding: at guidance g the model learns the output of the `teacher` with
    classifier-free guidance of 1 + (g - 1) * GUIDANCE_STRENGTH; at 1 that of the teacher itself."""

    def __init__(self, teacher: FluxTransformer2DModel) -> None:
        self.teacher = teacher

    def __call__(self, training: Training, pool: Pool) -> Tensor:
        clean, text = pool.batch(training)
        noisy, sigma, _ = noised(training, clean)
        guidance = drawn_guidance(training)
        nothing = pool.empty.rows(torch.zeros(BATCH, dtype=torch.long))
        with torch.no_grad():
            free = velocity(self.teacher, noisy, sigma, nothing, torch.ones(BATCH))
            conditional = velocity(self.teacher, noisy, sigma, text, torch.ones(BATCH))
            target = free + (1 + (guidance[:, None, None] - 1) * GUIDANCE_STRENGTH) * (conditional - free)
        return F.mse_loss(velocity(training.model, noisy, sigma, text, guidance), target)


def noised(training: Training, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`clean` with added noise, the noise levels [B] and the noise. A share of the levels is uniform at the top, where
    the number of objects and their places are decided."""
    sigma = shifted(torch.randn(len(clean), generator=training.draws).sigmoid())
    top = 1 - TOP_LEVELS * torch.rand(len(clean), generator=training.draws)
    sigma = torch.where(torch.rand(len(clean), generator=training.draws) < TOP_SHARE, top, sigma)
    eps = torch.randn(clean.shape, generator=training.draws)
    return clean + sigma[:, None, None] * (eps - clean), sigma, eps


def run(
    training: Training,
    pool: Pool,
    objective: Callable[[Training, Pool], Tensor],
    steps: int,
    path: Path,
    probe: Callable[[Training], None],
    probe_every: int,
) -> None:
    """Train up to step `steps`, saving to `path` every SAVE_EVERY_S seconds and at the end."""
    before, started = training.seconds, time.monotonic()
    saved, shown, losses = started, training.step, 0.0
    while training.step < steps:
        loss = objective(training, pool)
        training.update(loss, rate_at(training.step, steps))
        losses += loss.item()
        training.seconds = before + time.monotonic() - started
        if training.step % 50 == 0 or training.step == steps:
            count = training.step - shown
            print(
                f"step {training.step:6d}  loss {losses / count:.4f}  {training.seconds / training.step:.3f} s/step",
                flush=True,
            )
            shown, losses = training.step, 0.0
        if time.monotonic() - saved > SAVE_EVERY_S or training.step == steps:
            training.save(path)
            saved = time.monotonic()
        if training.step % probe_every == 0 or training.step == steps:
            probe(training)
