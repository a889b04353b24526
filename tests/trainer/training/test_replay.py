"""A step's batch rebuilt in one process is the one that the ranks trained on, sample by sample."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ranked
import runs
import tiny_flux
from bifrost.trainer.errors import RunError
from bifrost.trainer.training.run_history import History

pytestmark = pytest.mark.multi


def train_and_keep(arguments: list[str], step: int, spike: float | None) -> list[dict]:
    """Train; returns what this rank's model got at `step`: keys, masks, captions' lengths, level. spike: the loss times
    that there, and in the next two steps."""
    from bifrost.data import reader
    from bifrost.trainer.optim import engine
    from bifrost.trainer.training import loop

    kept, done = [], 0
    forward, on_device, advance = engine.Engine.forward, loop.on_device, engine.Engine.step

    def watched(batch: reader.Batch, device):
        if done == step - 1:
            arrays = batch.arrays
            samples = len(batch.keys)
            extra = {n: arrays[n].unflatten(0, (samples, -1)).tolist() for n in ("mask", "level") if n in arrays}
            kept.append({"keys": batch.keys, **extra})
        return on_device(batch, device)

    def spiking(self, batch):
        losses = forward(self, batch)
        return losses._replace(loss=losses.loss * spike) if spike and step - 1 <= done < step + 2 else losses

    def counted(self, lr, skip):
        nonlocal done
        done += 1
        return advance(self, lr, skip)

    loop.on_device, engine.Engine.forward, engine.Engine.step = watched, spiking, counted
    ranked.succeed(arguments)
    return kept


def test_stage_1(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=7", "checkpoint.every=2", "branch.loss_tokens=masked", "branch.caption_dropout=0.5")
    settings += ("data.image_size=112", "branch.draws=2")
    ended = ranked.run(train_and_keep, 2, runs.arguments(shards, tmp_path, *settings), 5, None)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run = tmp_path / "tiny-mllm"
    line = runs.steps(run)[4]

    found = runs.replay(run, "--step=5", f"--out={tmp_path / 'out'}")
    assert (found["step"], found["batch"], found["weights_step"], found["weights_exact"]) == (5, 5, 4, True)
    assert found["loss"] == pytest.approx(line["loss"], abs=1e-5)
    assert np.mean([sample["loss"] for sample in found["samples"]]) == pytest.approx(line["loss"], abs=1e-5)
    assert found["data_digest"] == line["data_digest"] == found["logged_data_digest"]
    seen = {
        key: mask for rank in ended for part in rank.value for key, mask in zip(part["keys"], part["mask"], strict=True)
    }
    assert len(seen) == 8
    assert {sample["key"] for sample in found["samples"]} == seen.keys()
    for sample in found["samples"]:
        for mask, draw in zip(seen[sample["key"]], ("", "_2"), strict=True):
            assert sorted(sample[f"hidden{draw}"]) == np.flatnonzero(mask).tolist()
            assert sample[f"mask_rate{draw}"] == pytest.approx(len(sample[f"hidden{draw}"]) / 16)
    assert {sample["caption_dropped"] for sample in found["samples"]} == {True, False}
    assert all(f"number {int(sample['key'][-3:])}" in sample["caption"] for sample in found["samples"])
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 96 and sheet.height > 3 * 96
    assert json.loads((tmp_path / "out" / "batch.json").read_text()) == found

    # Step 6 has no checkpoint of step 5: the same samples, by weights one step older.
    found = runs.replay(run, "--step=6")
    assert (found["weights_step"], found["weights_exact"]) == (4, False)
    assert found["data_digest"] == runs.steps(run)[5]["data_digest"]
    assert found["loss"] != pytest.approx(runs.steps(run)[5]["loss"], abs=1e-5)
    # The first step's weights are the initial ones.
    assert runs.replay(run, "--step=1")["loss"] == pytest.approx(runs.steps(run)[0]["loss"], abs=1e-5)


def test_stage_2_by_batch_statistics_of_all_ranks(shards: Path, tmp_path: Path) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    settings = ("steps=4", "checkpoint.every=2", f"flux.path={flux}", "micro_batch=2", "flux.draws=2")
    arguments = runs.arguments(shards, tmp_path, *settings, recipe="tiny-controlnet")
    ended = ranked.run(train_and_keep, 2, arguments, 3, None)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    run = tmp_path / "tiny-controlnet"
    found = runs.replay(run, "--step=3")
    assert found["weights_exact"]
    assert found["loss"] == pytest.approx(runs.steps(run)[2]["loss"], abs=1e-5)
    assert found["data_digest"] == runs.steps(run)[2]["data_digest"]
    seen = {k: v for rank in ended for part in rank.value for k, v in zip(part["keys"], part["level"], strict=True)}
    assert len(seen) == 8
    assert {sample["key"] for sample in found["samples"]} == seen.keys()
    for sample in found["samples"]:
        # A logit of 0 is the middle of the noise levels, a large one no noise.
        levels = [1 - 1 / (1 + math.exp(-logit)) for logit in seen[sample["key"]]]
        assert [sample["noise_level"], sample["noise_level_2"]] == pytest.approx(levels, abs=1.01e-3)
        assert len(sample["noise_seed"]) == 3


def test_after_a_rollback_both_steps_can_be_seen(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=10", "checkpoint.every=4", "health.max_bad_steps=3", "health.window=8")
    ended = ranked.run(train_and_keep, 1, runs.arguments(shards, tmp_path, *settings), 6, 1e4)
    assert ended[0].code == 0, ended[0].err
    run = tmp_path / "tiny-mllm"
    [rollback] = runs.events(run, "rollback")
    assert (rollback["step"], rollback["to"], rollback["batch"]) == (8, 4, 8)
    bad = runs.events(run, "skipped_step")[0]
    assert bad["batch"] == 6

    passed = runs.replay(run, "--batch=6")
    assert (passed["step"], passed["weights_step"]) == (6, 4)
    assert {sample["key"] for sample in passed["samples"]} == {key for key, _ in bad["samples"]}
    assert passed["skipped"] == bad["reason"]
    counted = runs.replay(run, "--step=5")
    assert (counted["batch"], counted["weights_exact"], counted["skipped"]) == (9, True, None)
    assert counted["loss"] == pytest.approx(runs.steps(run)[4]["loss"], abs=1e-5)
    assert counted["data_digest"] == runs.steps(run)[4]["data_digest"]


def test_the_story_of_a_run() -> None:
    """Killed after a rollback, before it saved: the next start knows nothing of it, and the steps are those again."""
    start = {"event": "start", "ranks": 2, "micro_batch": 4}
    records = [
        {**start, "step": 0, "batch": 0},
        {"step": 8, "batch": 8, "data_digest": "a"},
        {"event": "skipped_step", "step": 10, "batch": 10},
        {"event": "skipped_step", "step": 11, "batch": 11},
        {"event": "rollback", "step": 11, "to": 8, "batch": 11},
        {"event": "skipped_step", "step": 9, "batch": 12},
        {**start, "step": 8, "batch": 8, "ranks": 4},
        {"event": "skipped_step", "step": 10, "batch": 10},
        {"event": "rollback", "step": 11, "to": 8, "batch": 11},
        {"step": 9, "batch": 12, "data_digest": "b"},
        {"step": 10, "batch": 13, "data_digest": "c"},
    ]
    history = History.of(records)
    assert [history.step(step).batch for step in (8, 9, 10)] == [8, 12, 13]
    assert history.step(9).digest_before == "a", "the step before is the one gone back to"
    assert history.step(10).digest_before == "b"
    assert (history.step(11).batch, history.step(11).line) == (11, None), "not reached again: the one passed over"
    with pytest.raises(RunError, match="step 12: the run has reached step 11; give 1 to 11"):
        history.step(12)
    assert history.step(9).others == (9,)
    assert (history.batch(10).step, history.batch(10).stretch.ranks) == (10, 4)
    assert history.batch(10).line is None, "the line of step 10 is of another batch"
    with pytest.raises(RunError, match="batch 15: no step of the run"):
        history.batch(15)
    with pytest.raises(RunError, match="lost its beginning"):
        History.of([{**start, "step": 8}]).step(3)


def test_older_runs_have_their_step_for_a_batch() -> None:
    history = History.of([{"event": "start", "step": 0, "ranks": 1}, {"step": 5, "data_digest": "x"}])
    place = history.step(5)
    assert (place.batch, place.line, place.digest_before) == (5, {"step": 5, "data_digest": "x"}, None)
