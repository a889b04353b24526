"""Ranks with very different samples, such as an empty and a very long caption, or all patches masked and only one: all
run the same modules, so that no rank hangs, and every trained tensor gets a gradient on each rank."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ranked
import runs
import small_model
from bifrost.data import write_shard

pytestmark = pytest.mark.multi
RANKS = 3


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Captions of one and of a thousand words; images of one pixel and wide ones."""
    samples = []
    for number in range(36):
        pixels = np.random.default_rng(number).integers(0, 256, (1 + 40 * (number % 2), 1 + number, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        caption = "moon" if number % 3 else "many colours " * 500
        samples.append((f"{number:03d}", {"png": file.getvalue(), "txt": caption.encode()}))
    write_shard(tmp_path / "shards" / "train-00000.tar", samples)
    return tmp_path / "shards"


def train_and_watch(arguments: list[str]) -> list[dict]:
    """Train; returns per step the text tokens and masked patches of this rank's sample, and the trained tensors without
    a gradient from it."""
    from bifrost.trainer.optim import engine

    steps: list[dict] = []
    init, forward = engine.Engine.__init__, engine.Engine.forward

    def watched_init(self, model, *rest):
        for name, parameter in model.trainable().items():
            parameter.register_hook(lambda gradient, name=name: steps[-1]["without"].remove(name))
        init(self, model, *rest)

    def watched_forward(self, batch):
        lengths, hidden = batch["text_lengths"], int(batch["mask"].sum())
        steps.append({"text": sum(lengths), "hidden": hidden, "without": list(self.trainable())})
        return forward(self, batch)

    engine.Engine.__init__, engine.Engine.forward = watched_init, watched_forward
    ranked.succeed(arguments)
    return steps


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_no_rank_hangs_and_all_get_gradients(uneven: Path, tmp_path: Path, tokens: str) -> None:
    settings = [f"branch.loss_tokens={tokens}", "branch.caption_dropout=0.4", "steps=12", "global_batch=3"]
    settings += ["branch.mask_rate.mean=0.5", "branch.mask_rate.std=100", "branch.mask_rate.low=0"]
    settings += ["micro_batch=1", "branch.max_text_tokens=300", *small_model.settings(tmp_path / "backbone")]
    arguments = runs.arguments(uneven, tmp_path / "three", *settings)
    ended = ranked.run(train_and_watch, RANKS, arguments, timeout=120)
    assert [rank.code for rank in ended] == [0] * RANKS, ended[0].err
    steps = list(zip(*(rank.value for rank in ended), strict=True))
    assert len(steps) == 12
    assert all(not rank["without"] for step in steps for rank in step)
    text, hidden = ([{rank[key] for rank in step} for step in steps] for key in ("text", "hidden"))
    longest, shortest = max(set.union(*text)), min(set.union(*text))
    assert any({longest, shortest} <= step for step in text) and longest > 10 * shortest
    assert any({1, 4} <= step for step in hidden), "no step with every patch hidden on one rank and one on another"

    arguments = runs.arguments(uneven, tmp_path / "one", *settings)
    assert ranked.bifrost(1, *arguments)[0].code == 0
    three, one = (runs.losses(tmp_path / name / "tiny-mllm") for name in ("three", "one"))
    np.testing.assert_allclose(three, one, rtol=1e-5)
