"""Train the demo's tiny Qwen2.5-VL and its tokenizer on scenes.

    python examples/foundations/tiny_mllm.py WORK --out recipes/foundations/tiny

It learns to describe scenes and to answer questions about them, to predict captions in stage 1's prompts, and to keep
the image itself in its patch latents, which stage 2 decodes to pixels. WORK is a folder for the state of the training,
which is saved every few minutes and resumed. Equal seeds, steps and thread counts give equal weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mllm_init import IMAGE_SIZE, build, every_latent
from mllm_objectives import Dialogue, Heads, Prompts, losses, to_images
from mllm_probes import report
from tokenizer import DESCRIBE, train_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifrost.data import Plan
from bifrost.data.scenes.grammar import Scene
from bifrost.data.scenes.heldout import HELD_OUT, heldout_scenes, training_scenes
from bifrost.data.scenes.questions import Question, questions

BATCH = 48
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 50
FINAL_SHARE = 0.03  # of the learning rate, reached linearly over the second half
MATRICES = ("layers.", "blocks.", "merger.")
FITTED, FITTED_SCALE = ("model.visual", "pixels."), 0.2  # initialized to a solution, which full steps would lose
SHIFT = 2  # maximal shift of a scene in pixels; its border is replicated
SCENES, FITTED_IMAGES, TURNS, MEASURED = 12000, 1500, 4, 450
CHECKPOINT, SAVE_EVERY_S = "mllm.pt", 240.0


class Lessons(NamedTuple):
    """Training scenes: images uint8 [n, 3, S, S], captions, and the questions on each."""

    images: Tensor
    captions: list[str]
    questions: list[list[Question]]

    def dialogue(self, row: int, draws: np.random.Generator) -> Dialogue:
        """A description of the image, for most images after TURNS of its questions: answers cannot be read from it."""
        described = (DESCRIBE, self.captions[row])
        if draws.random() < 0.3:
            return [described]
        order = draws.permutation(len(self.questions[row]))[:TURNS]
        return [*(self.questions[row][i][1:] for i in order), described]


def read_lessons(scenes: list[Scene]) -> Lessons:
    return Lessons(to_images(scenes), [scene.caption for scene in scenes], list(map(questions, scenes)))


def shifted(images: Tensor, draws: np.random.Generator) -> Tensor:
    """Images randomly shifted by up to SHIFT pixels."""
    padded = F.pad(images.float(), (SHIFT,) * 4, mode="replicate").to(torch.uint8)
    corners = draws.integers(0, 2 * SHIFT + 1, (len(images), 2)).tolist()
    moved = [p[:, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for p, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(moved)


def optimizers(model: nn.Module, heads: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks and merger, AdamW for all others; `scale` multiplies the learning rate."""
    parameters = [*model.named_parameters(), *heads.named_parameters()]
    matrices = [p for name, p in parameters if p.ndim == 2 and any(part in name for part in MATRICES)]
    chosen = set(map(id, matrices))
    rest = [(name, p) for name, p in parameters if id(p) not in chosen]
    fitted = [p for name, p in rest if name.startswith(FITTED)]
    free = [p for name, p in rest if not name.startswith(FITTED)]
    groups = [{"params": free, "scale": 1.0}, {"params": fitted, "scale": FITTED_SCALE}]
    return [
        torch.optim.Muon(
            [{"params": matrices, "scale": 1.0}], lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Warmup, constant, then linear decay over the second half."""
    late = max(0.0, 2 * step / steps - 1)
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - (1 - FINAL_SHARE) * late)


class Training:
    """Model, heads and optimizers; saved and restored as a whole."""

    def __init__(self, model: nn.Module, heads: Heads) -> None:
        self.model, self.heads, self.step = model, heads, 0
        self.rules = optimizers(model, heads)

    def save(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "step": self.step}
        torch.save({**state, "rules": [rule.state_dict() for rule in self.rules]}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for rule, values in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(values)
        self.step = state["step"]


def train(training: Training, prompts: Prompts, lessons: Lessons, steps: int, seed: int, path: Path) -> None:
    """Train in place up to step `steps`, saving to `path`."""
    plan = Plan([len(lessons.captions)], seed)
    parameters = [*training.model.parameters(), *training.heads.parameters()]
    started, first = time.monotonic(), training.step
    saved = started
    while (step := training.step) < steps:
        draws = np.random.default_rng((seed, step))
        chosen = plan.locate(np.arange(step * BATCH, (step + 1) * BATCH)).index
        images = shifted(lessons.images[torch.from_numpy(chosen)], draws)
        captions, dialogues = [lessons.captions[i] for i in chosen], [lessons.dialogue(i, draws) for i in chosen]
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            parts = losses(training.model, training.heads, prompts, images, captions, dialogues)
            loss = parts.total()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for rule in training.rules:
            for group in rule.param_groups:
                group["lr"] = group["scale"] * learning_rate(step, steps)
            rule.step()
            rule.zero_grad()
        training.step += 1
        if training.step % 25 == 0 or training.step == steps:
            shown = "  ".join(f"{name} {value.item():.3f}" for name, value in parts._asdict().items())
            seconds = (time.monotonic() - started) / (training.step - first)
            print(f"step {training.step:5d}  {shown}  {seconds:.3f} s/step", flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S or training.step == steps:
            training.save(path)
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the state of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--steps", type=int, default=1500, help=f"steps of {BATCH} scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    scenes = training_scenes(SCENES, arguments.seed)
    lessons = read_lessons(scenes)
    dialogues = [f"{text} {answer}" for asked in lessons.questions for _, text, answer in asked]
    prompts = Prompts(train_tokenizer(lessons.captions, dialogues, 1536, arguments.out))
    model, heads = build(prompts.tokenizer, lessons.images[:FITTED_IMAGES]), Heads()
    heads.fit_pixels(every_latent(model, lessons.images[:FITTED_IMAGES]), lessons.images[:FITTED_IMAGES])
    training = Training(model, heads)
    if (arguments.work / CHECKPOINT).exists():
        training.restore(arguments.work / CHECKPOINT)
    train(training, prompts, lessons, arguments.steps, arguments.seed, arguments.work / CHECKPOINT)
    model.to(torch.bfloat16).save_pretrained(arguments.out)

    seen = list({scene.caption: scene for scene in scenes}.values())[:MEASURED]
    heldout = heldout_scenes(MEASURED // len(HELD_OUT), arguments.seed + 1)
    parts = {"train": seen, "heldout": heldout}
    print(json.dumps(report(model.float(), heads, prompts, parts), indent=1))


if __name__ == "__main__":
    main()
