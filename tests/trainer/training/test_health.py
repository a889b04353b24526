"""Bad numbers: every rank skips the step, and nothing is poisoned. What follows too many: test_rollback.py."""

from pathlib import Path

import pytest

import ranked
import runs
import tiny_flux

pytestmark = pytest.mark.multi


def train_with_bad_steps(arguments: list[str], bad: list[int], kind: str, factor: float) -> list:
    """Train while rank 1 has its loss, or gradient alone, times `factor` at the given steps; returns of each step
    whether it was applied, and hashes of the state before and after."""
    import hashlib
    import os

    import torch

    from bifrost.trainer.optim import engine

    history = []
    forward, step = engine.Engine.forward, engine.Engine.step
    count = 0

    def digest(self) -> str:
        tensors = [*self.masters().values(), *(each for kind in self.moments().values() for each in kind.values())]
        tensors += [count.view(1) for count in self.step_counts()]
        tensors += [buffer.flatten() for buffer in self.model.statistics().values()]
        return hashlib.sha256(torch.cat(tensors).numpy().tobytes() + bytes([self.updates])).hexdigest()

    def bad_forward(self, batch):
        losses = forward(self, batch)
        if count in bad and os.environ["RANK"] == "1":
            if kind == "loss":
                return losses._replace(loss=losses.loss * factor)
            losses.loss.register_hook(lambda gradient: gradient * factor)
        return losses

    def watched_step(self, lr, skip):
        nonlocal count
        before = digest(self)
        applied = step(self, lr, skip)
        history.append([applied, before, digest(self)])
        count += 1
        return applied

    engine.Engine.forward, engine.Engine.step = bad_forward, watched_step
    ranked.succeed(arguments)
    return history


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(("factor", "precision"), [(float("nan"), "fp32"), (float("inf"), "bf16"), (1e4, "bf16")])
def test_a_bad_number_on_one_rank_skips_the_step_on_all(
    shards: Path, tmp_path: Path, kind: str, factor: float, precision: str
) -> None:
    settings = ("steps=7", f"precision={precision}", "micro_batch=4", "health.window=8")
    arguments = runs.arguments(shards, tmp_path, *settings)
    ended = ranked.run(train_with_bad_steps, 2, arguments, [4], kind, factor)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    for rank in ended:
        assert [applied for applied, _, _ in rank.value] == [True] * 4 + [False] + [True] * 2
        for applied, before, after in rank.value:
            assert (before == after) == (not applied)
    run = tmp_path / "tiny-mllm"
    assert [line["skipped_steps"] for line in runs.steps(run)] == [0, 0, 0, 0, 1, 1, 1]
    assert all(line["loss"] < 10 for line in runs.steps(run) if line["step"] != 5)
    [event] = runs.events(run, "skipped_step")
    assert (event["step"], event["batch"]) == (5, 5)
    assert event["reason"].startswith("gradient norm" if kind == "gradient" else "loss")
    keys, losses = zip(*event["samples"], strict=True)
    assert len(set(keys)) == 8 and all(key.startswith("pattern-") for key in keys)
    assert sum(losses[:4]) == pytest.approx(event["rank_losses"][0], rel=1e-2)
    if factor == 1e4:
        assert (event["loss"] if kind == "loss" else event["grad_norm"]) > 100
    else:
        assert runs.steps(run)[4]["grad_norm"] is None


def test_statistics_of_a_skipped_step_are_not_kept(shards: Path, tmp_path: Path) -> None:
    """Stage 2 has batch statistics in addition to its weights."""
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    settings = ("steps=6", f"flux.path={flux}", "micro_batch=4", "health.window=8", "health.spike_zscore=100")
    arguments = runs.arguments(shards, tmp_path, *settings, recipe="tiny-controlnet")
    for rank in ranked.run(train_with_bad_steps, 2, arguments, [4], "loss", 1e4):
        assert rank.code == 0, rank.err
        assert [applied for applied, _, _ in rank.value] == [True] * 4 + [False, True]
        assert rank.value[4][2] == rank.value[3][2], "the forward pass has moved them"


def test_our_gradient_norm_is_deepspeeds(shards: Path, tmp_path: Path) -> None:
    """Known before the update, from the exchange that every step has, and what it clips by."""
    ended = ranked.run(train_and_take_norms, 2, runs.arguments(shards, tmp_path, "steps=3"))
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    logged = [line["grad_norm"] for line in runs.steps(tmp_path / "tiny-mllm")]
    assert logged == pytest.approx(ended[0].value, rel=1e-6)


def train_and_take_norms(arguments: list[str]) -> list[float]:
    from bifrost.trainer.optim import engine

    norms = []
    step = engine.Engine.step

    def watched_step(self, lr, skip):
        applied = step(self, lr, skip)
        norms.append(float(self._engine.get_global_grad_norm()))
        return applied

    engine.Engine.step = watched_step
    ranked.succeed(arguments)
    return norms
