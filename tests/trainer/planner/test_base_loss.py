"""The plan of the frozen base's own loss: FLOPs against torch's own counter, and what it adds to a step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import plain
from bifrost.data import Item
from bifrost.recipes import load_recipe
from bifrost.trainer.cli.main import app
from bifrost.trainer.planner import open_model, parts
from bifrost.trainer.planner.base_loss import base_parts

SMALL = ("precision=fp32", "global_batch=4", "micro_batch=4", "data.workers=0", "data.shuffle_window=2")


def overrides(shards: Path) -> list[str]:
    listed = [f"{{name: images, shards: '{shards}/train-*.tar', weight: 1}}"]
    for name, member, rate in (("asked", "json", 0.5), ("text", "txt", 2)):
        own = f"task: understanding, captions: {{{member}: 1}}, batches_per_step: {rate}"
        listed.append(f"{{name: {name}, shards: x, {own}}}")
    return [*SMALL, "data.shards=null", f"data.sources=[{', '.join(listed)}]"]


@pytest.mark.parametrize("asks", [False, True])
def test_linear_flops_are_torchs_own(asks: bool, shards: Path) -> None:
    recipe = load_recipe("tiny-mllm", overrides(shards))
    inputs, model = plain.loaded(recipe)
    image = np.zeros((112, 112, 3) if asks else (0, 0, 3), np.uint8)
    text = "a red car and two blue hearts above a dog " * 12
    items = [Item(0, n, f"k{n}", image, text, question="what is it?" if asks else None) for n in range(4)]
    batch = inputs.stage.text_collate()(items)
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    flops = counter.get_flop_counts()["Global"]
    linear = sum(n for operator, n in flops.items() if str(operator).split(".")[1] in ("mm", "addmm", "convolution"))
    tokens = sum(batch["text_lengths"]) / 4 - (16 if asks else 0)
    planned = {part.name: part.linear for part in base_parts(open_model(recipe), tokens, 4 if asks else 0)}
    # The plan takes every token of the text as predicted.
    planned["language head"] *= len(batch["rows"]) / 4 / tokens
    assert linear == pytest.approx(4 * sum(planned.values()), rel=2e-3)
    assert ("vision encoder" in planned) == asks


def test_the_plan_states_what_they_add(shards: Path) -> None:
    arguments = ["plan", "tiny-mllm", *overrides(shards), "--gpus", "1", "--device", "h200", "--text-tokens", "50"]
    ended = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(ended.output)
    recipe = load_recipe("tiny-mllm", overrides(shards))
    model, useful = open_model(recipe), found["flops_per_sample"]["with_recomputation"]
    for each, (name, rate, image) in zip(found["base_loss"], (("asked", 0.5, 4), ("text", 2, 0)), strict=True):
        flops = rate * sum(part.forward for part in base_parts(model, 50, image))
        assert (each["name"], each["batches_per_step"], each["tokens"]) == (name, rate, 50 + image**2)
        assert each["flops"] == pytest.approx(4 * flops) and each["flops_share"] == pytest.approx(flops / useful)
        assert 0.5 < each["time_share"] / each["flops_share"] < 2
    (head,) = [part for part in parts(recipe) if part.name == "language head"]
    config = model.config.text_config
    assert head.size == config.vocab_size * config.hidden_size
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "base loss of text: 2 batches per step" in shown
