"""Bad numbers: every rank skips the step, nothing is poisoned, and too many in a row end the run."""

from pathlib import Path

import pytest

import ranked
import runs

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def train_with_bad_steps(arguments: list[str], bad: list[int], kind: str) -> list:
    """Train while rank 1 meets a bad number at the given steps; returns hashes of the state around each."""
    import hashlib
    import os

    import torch

    from bifrost.trainer import engine

    history = []
    forward, step = engine.Engine.forward, engine.Engine.step
    count = 0

    def digest(self) -> str:
        tensors = [*self.masters().values(), *self.moments("exp_avg").values(), *self.moments("exp_avg_sq").values()]
        return hashlib.sha256(torch.cat(tensors).numpy().tobytes() + bytes([self.updates])).hexdigest()

    def bad_forward(self, batch):
        losses = forward(self, batch)
        if count in bad and os.environ["RANK"] == "1":
            if kind == "loss":
                return losses._replace(loss=losses.loss * float("nan"))
            losses.loss.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    def watched_step(self, lr, finite):
        nonlocal count
        before = digest(self)
        result = step(self, lr, finite)
        history.append([result.applied, before, digest(self)])
        count += 1
        return result

    engine.Engine.forward, engine.Engine.step = bad_forward, watched_step
    try:
        ranked.command(arguments)
    except SystemExit as ended:
        assert not ended.code
    return history


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_number_on_one_rank_skips_the_step_on_all(
    shards: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=5", f"precision={precision}", "micro_batch=4")
    ended = ranked.run(train_with_bad_steps, 2, arguments, [2], kind)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    for rank in ended:
        assert [applied for applied, _, _ in rank.value] == [True, True, False, True, True]
        for applied, before, after in rank.value:
            assert (before == after) == (not applied)
    run = tmp_path / "tiny-mllm"
    assert [line["skipped_steps"] for line in runs.steps(run)] == [0, 0, 1, 1, 1]
    assert runs.steps(run)[2]["grad_norm"] is None
    assert [line["step"] for line in runs.events(run, "skipped")] == [3]
    assert all(line["loss"] < 10 for line in runs.steps(run) if line["loss"] is not None)


def test_too_many_in_a_row_end_the_run(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=9", "health.max_bad_steps=3", "checkpoint.every=2")
    ended = ranked.run(train_with_bad_steps, 2, arguments, [2, 3, 4, 5], "loss")
    assert [rank.code for rank in ended] == [1, 1]
    assert "3 steps in a row were skipped" in ended[0].err
    run = tmp_path / "tiny-mllm"
    assert runs.events(run, "end")[-1]["outcome"] == "failed"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
