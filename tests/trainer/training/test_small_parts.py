"""Schedule, average, sequence digest, meter, initial weights: small parts."""

import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bifrost.data import open_dataset, write_shard
from bifrost.recipes import load_recipe
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.errors import RunError
from bifrost.trainer.monitors.meter import Meter
from bifrost.trainer.monitors.phase_timer import PhaseTimer
from bifrost.trainer.optim.ema import Ema
from bifrost.trainer.optim.lr_schedule import learning_rate
from bifrost.trainer.training.data_digest import SequenceDigest, comparable
from bifrost.trainer.training.model import initialise_from


def test_warm_up_then_cosine() -> None:
    recipe = load_recipe("tiny-mllm", ["steps=110", "optimizer.warmup_steps=10", "optimizer.lr=1.0"])
    assert [learning_rate(recipe.optimizer, recipe.steps, step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(recipe.optimizer, recipe.steps, 10) == 1.0
    assert learning_rate(recipe.optimizer, recipe.steps, 60) == pytest.approx(0.5)
    assert learning_rate(recipe.optimizer, recipe.steps, 109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert 0 < learning_rate(recipe.optimizer, recipe.steps, 109) < 1e-3


def test_constant_keeps_the_peak() -> None:
    recipe = load_recipe("tiny-mllm", ["steps=50", "optimizer.warmup_steps=0", "optimizer.schedule=constant"])
    assert {learning_rate(recipe.optimizer, recipe.steps, step) for step in range(50)} == {recipe.optimizer.lr}


def test_average_follows_the_formula() -> None:
    masters = {"w": torch.tensor([0.0, 10.0])}
    ema = Ema(masters, decay=0.2)
    wanted = torch.tensor([0.0, 10.0])
    for value, decay in ((1.0, 2 / 11), (2.0, 0.2), (3.0, 0.2)):  # 3 / 12 is above 0.2
        masters["w"].fill_(value)
        ema.update(masters)
        wanted = decay * wanted + (1 - decay) * value
    torch.testing.assert_close(ema.slices["w"], wanted)


def test_statistics_are_averaged_like_the_weights() -> None:
    live = {"mean": torch.tensor([4.0]), "count": torch.tensor(3)}
    ema = Ema({}, 0.5, live)
    for value, decay in ((1.0, 2 / 11), (2.0, 3 / 12), (6.0, 4 / 13)):
        before = ema.statistics["mean"].clone()
        live["mean"].fill_(value)
        live["count"] += 1
        ema.update({}, live)
        torch.testing.assert_close(ema.statistics["mean"], decay * before + (1 - decay) * value)
    assert ema.statistics["count"] == 6 and ema.statistics["count"].dtype == torch.int64


def test_digest_knows_samples_and_history_but_no_ranks() -> None:
    def after(*steps: list[list[str]]) -> str:
        digest = SequenceDigest()
        for ranks in steps:
            prints = [digest.fingerprint(keys) for keys in ranks]
            digest.advance(*(sum(column) for column in zip(*prints, strict=True)))
        return digest.value

    assert after([["a", "b", "c", "d"]]) == after([["a", "b"], ["c", "d"]]) == after([["d", "a"], ["b"], ["c"]])
    assert after([["a", "b"]]) != after([["a", "c"]])
    assert after([["a", "b"]]) != after([["a", "b", "b"]])
    assert after([["a"]], [["b"]]) != after([["b"]], [["a"]])
    assert after([["a"]]).startswith("2:")


def test_samples_of_two_shards_with_one_key_are_two(tmp_path) -> None:
    """Keys usually restart in every tar: runs that read different tars with equal keys must have different digests."""
    for number, caption in enumerate((b"one", b"other")):
        write_shard(tmp_path / f"s-{number}.tar", [("000000", {"png": b"x", "txt": caption})])
    dataset = open_dataset(str(tmp_path / "s-*.tar"))
    key = dataset.entry(0, 0)[0]
    assert key == dataset.entry(1, 0)[0] == "000000"
    first, second = (SequenceDigest.fingerprint([dataset.name(shard, key)]) for shard in range(2))
    assert first != second
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert open_dataset(str(tmp_path / "moved")).name(1, key) == dataset.name(1, key)


def test_digests_of_earlier_releases_are_continued_and_not_compared() -> None:
    old, new = "0123456789abcdef", SequenceDigest().advance(1, 2)
    continued = SequenceDigest(old).advance(1, 2)
    assert continued.startswith("1+2:") and SequenceDigest(continued).advance(1, 2).startswith("1+2:")
    assert continued != SequenceDigest("f" * 16).advance(1, 2)
    assert comparable(new, SequenceDigest().advance(2, 1)) and comparable(old, "f" * 16)
    assert not comparable(old, new) and not comparable(continued, new) and not comparable(None, new)
    assert comparable(continued, continued) and not comparable(continued, SequenceDigest(continued).advance(1, 1))


def test_rates_leave_out_what_is_not_the_steps() -> None:
    meter, phase = Meter(), PhaseTimer()
    with phase("save"):
        time.sleep(0.2)
    with phase("data"):
        time.sleep(0.05)
    meter.count(10, 100)
    phase.step_done(1)
    rates = meter.rates(phase.take())
    assert rates["data_wait_s"] == pytest.approx(0.05, abs=0.02)
    assert rates["step_s"] < 0.15
    assert rates["tokens_per_s"] == pytest.approx(10 * rates["samples_per_s"])


def test_a_run_of_the_other_stage_gives_no_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    reader = SimpleNamespace(state={"recipe": {"stage": "controlnet"}})
    monkeypatch.setattr(Store, "newest_verified", lambda *_, **__: reader)
    model: Any = None
    with pytest.raises(RunError, match=r"is a controlnet run, expected a patch-latents run"):
        initialise_from(model, "patch-latents", model, tmp_path)
