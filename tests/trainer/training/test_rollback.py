"""Too many skipped steps in a row: the run goes back, passes over the bad samples, and is a run that never had them."""

import json
from pathlib import Path

import numpy as np
import pytest

import ranked
import runs

pytestmark = pytest.mark.multi

SETTINGS = ("steps=14", "checkpoint.every=4", "checkpoint.keep=9", "ema.decay=0.9", "health.max_bad_steps=3")
SETTINGS += ("health.window=8", "micro_batch=4")
BAD = [9, 10, 11]
"""Global batches, counted from 0, that are bad: steps 10 to 12. The last checkpoint before them is of step 8."""


def train_badly(arguments: list[str], bad: list[int], factor: float, cut: list[int] | None, killed: str | None) -> None:
    """Train while the last rank's loss is times `factor` in the global batches `bad`.

    cut: batches that the data never had: first, and number. killed: when the rank kills itself.
    """
    import os
    import signal

    from bifrost.data import reader
    from bifrost.trainer.checkpoint.store import Store
    from bifrost.trainer.optim import engine
    from bifrost.trainer.training import build
    from bifrost.trainer.training.inputs import Inputs

    current = 0
    forward, normalizer, positions, remove = (
        engine.Engine.forward,
        Inputs.normalizer,
        reader.rank_positions,
        Store.remove_after,
    )

    def moved(batch: int) -> int:
        return batch + cut[1] if cut and batch >= cut[0] else batch

    def watched_normalizer(self, batch, passes):
        nonlocal current
        current = batch
        return normalizer(self, moved(batch), passes)

    def bad_forward(self, batch):
        losses = forward(self, batch)
        if current in bad and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            return losses._replace(loss=losses.loss * factor)
        return losses

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly_remove(self, *arguments):
        if killed == "before the removal":
            die()
        remove(self, *arguments)
        if killed == "after the removal":
            die()

    def deadly_rate(optimizer, steps, step):
        if killed == "after it" and step == 9 and current > 11:
            die()
        return rate(optimizer, steps, step)

    rate = build.learning_rate
    engine.Engine.forward, Inputs.normalizer, Store.remove_after = bad_forward, watched_normalizer, deadly_remove
    reader.rank_positions = lambda step, *share: positions(moved(step), *share)
    build.learning_rate = deadly_rate
    ranked.command(arguments)


def train(
    shards: Path,
    folder: Path,
    ranks: int,
    *settings: str,
    bad: list[int] = BAD,
    factor: float = float("nan"),
    cut: list[int] | None = None,
    killed: str | None = None,
) -> tuple[Path, list[ranked.Rank]]:
    arguments = runs.arguments(shards, folder, *SETTINGS, *settings)
    return folder / "tiny-mllm", ranked.run(train_badly, ranks, arguments, bad, factor, cut, killed)


@pytest.fixture(scope="module")
def without(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks whose data never had batches 8 to 11."""
    run, ended = train(shards, tmp_path_factory.mktemp("without"), 2, bad=[], cut=[8, 4])
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    return run


def same(run: Path, other: Path) -> bool:
    keys = ("step", "samples", "loss", "loss_masked", "grad_norm", "lr", "data_digest", "skipped_steps")
    lines = [[[line[key] for key in keys] for line in runs.steps(each)] for each in (run, other)]
    last = "checkpoints/step-00000014/rank-00000.safetensors"
    return lines[0] == lines[1] and (run / last).read_bytes() == (other / last).read_bytes()


@pytest.mark.parametrize("factor", [float("nan"), 1e4])
def test_goes_on_as_if_the_samples_had_never_been(shards: Path, tmp_path: Path, without: Path, factor: float) -> None:
    run, ended = train(shards, tmp_path, 2, factor=factor)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert same(run, without)


def test_hpz_copies_are_rolled_back_too(shards: Path, tmp_path: Path) -> None:
    """hpZ's copies of the discarded weights exist when the run rolls back."""
    nodes = ("zero.hpz=2", "zero.persistence_threshold=0", "micro_batch=1")
    run, ended = train(shards, tmp_path / "bad", 4, *nodes)
    wanted, _ = train(shards, tmp_path / "without", 4, *nodes, bad=[], cut=[8, 4])
    assert [rank.code for rank in ended] == [0] * 4, ended[0].err
    assert same(run, wanted)
    assert [line["batch"] for line in runs.steps(run)] == [*range(1, 9), *range(13, 19)]
    assert [(line["step"], line["batch"]) for line in runs.events(run, "skipped_step")] == [
        (10, 10),
        (11, 11),
        (12, 12),
    ]
    [event] = runs.events(run, "rollback")
    assert (event["step"], event["to"], event["batch"], event["skipped_batches"]) == (12, 8, 12, [9, 12])
    assert "back to the checkpoint of step 8, passing over global batches 9 to 12" in ended[0].out
    # The one of step 12 that was saved among the bad steps is gone, the later one is of the new history.
    assert [line["step"] for line in runs.events(run, "checkpoint")] == [4, 8, 12, 12, 14]
    state = json.loads((run / "checkpoints/step-00000012/state.json").read_text())
    assert (state["progress"]["batch"], state["progress"]["rollbacks"]) == (16, 1)


def test_base_losses_are_those_of_their_steps(shards: Path, tmp_path: Path) -> None:
    """The understanding sources go back, too: the run trains as it does without them, and every step has the losses of
    a run without bad steps, to the bit, whatever was read before the rollback."""
    trained = f"{{name: images, shards: '{shards}/train-*.tar', weight: 1}}"
    rates = {"texts": 1.5, "rare": 0.25, "half": 0.5}
    texts = [
        f"{{name: {name}, task: understanding, shards: '{shards}/train-*.tar', batches_per_step: {rate}}}"
        for name, rate in rates.items()
    ]
    alone, measured = (
        ("data.shards=null", f"data.sources=[{', '.join(listed)}]", "data.workers=1")
        for listed in ([trained], [trained, *texts])
    )
    run, ended = train(shards, tmp_path / "bad", 2, *measured)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert [event["to"] for event in runs.events(run, "rollback")] == [8]
    wanted, _ = train(shards, tmp_path / "without", 2, *alone, bad=[], cut=[8, 4])
    assert same(run, wanted)
    undisturbed, _ = train(shards, tmp_path / "undisturbed", 2, *measured, bad=[])
    of_steps = [
        [{key: line[key] for key in line if key.startswith("base_")} for line in runs.steps(each)]
        for each in (run, undisturbed)
    ]
    assert of_steps[0] == of_steps[1]
    read = {name: [n for n, line in enumerate(of_steps[0], 1) if f"base_loss_{name}" in line] for name in rates}
    assert read == {"texts": [*range(1, 15)], "rare": [4, 8, 12], "half": [*range(2, 15, 2)]}
    assert len({line["base_loss_texts"] for line in of_steps[0]}) == 14, "other batches in every step"


def test_any_number_of_ranks_decides_alike(shards: Path, tmp_path: Path, without: Path) -> None:
    """One rank to step 12, after the rollback, then two to the end."""
    run, ended = train(shards, tmp_path, 1, "steps=12")
    assert ended[0].code == 0, ended[0].err
    _, ended = train(shards, tmp_path, 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert [(line["step"], line["batch"]) for line in runs.events(run, "start")] == [(0, 0), (12, 16)]
    assert len(runs.events(run, "rollback")) == 1
    np.testing.assert_allclose(runs.losses(run), runs.losses(without), rtol=0, atol=1e-5)
    assert [line["data_digest"] for line in runs.steps(run)] == [line["data_digest"] for line in runs.steps(without)]


@pytest.mark.parametrize("moment", ["before the removal", "after the removal", "after it"])
def test_killed_in_a_rollback(shards: Path, tmp_path: Path, without: Path, moment: str) -> None:
    run, ended = train(shards, tmp_path, 2, killed=moment)
    assert {rank.code for rank in ended} <= {-9, 1} and any(rank.code == -9 for rank in ended)
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert saved[-1] == ("step-00000012" if moment == "before the removal" else "step-00000008")
    _, ended = train(shards, tmp_path, 2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert same(run, without)


def test_a_new_level_is_taken_for_normal(shards: Path, tmp_path: Path) -> None:
    """From batch 9 on every loss is 1,000 times as high: one rollback does not help, and no second one is tried."""
    run, ended = train(shards, tmp_path, 1, "steps=18", bad=list(range(9, 60)), factor=1000)
    assert ended[0].code == 0, ended[0].err
    assert [line["to"] for line in runs.events(run, "rollback")] == [8]
    assert [(line["step"], line["rollbacks"]) for line in runs.events(run, "baseline_reset")] == [(11, 2)]
    assert [line["step"] for line in runs.events(run, "skipped_step")][:6] == [10, 11, 12, 9, 10, 11]
    assert runs.steps(run)[-1]["loss"] > 10 and runs.steps(run)[-1]["skipped_steps"] < 6


def test_bad_numbers_without_end_stop_the_run(shards: Path, tmp_path: Path) -> None:
    run, ended = train(shards, tmp_path, 1, "health.max_rollbacks=2", bad=list(range(9, 60)))
    assert ended[0].code == 1
    assert "3 steps in a row were skipped" in ended[0].err and "health.max_rollbacks=2 is reached" in ended[0].err
    assert [(line["to"], line["batch"]) for line in runs.events(run, "rollback")] == [(8, 12), (8, 15)]
    assert runs.events(run, "end")[-1]["outcome"] == "failed"


def test_no_checkpoint_to_roll_back_to(shards: Path, tmp_path: Path) -> None:
    _, ended = train(shards, tmp_path, 1, bad=[1, 2, 3])
    assert ended[0].code == 1
    assert "no checkpoint is from before them" in ended[0].err


def test_a_running_engine_takes_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """The weights that it computes with too, also those that DeepSpeed keeps gathered."""
    ended = ranked.run(losses_around_a_reload, 2, runs.arguments(shards, tmp_path, "steps=6", "checkpoint.every=2"))
    for rank in ended:
        assert rank.code == 0, rank.err
        first, moved, again = rank.value
        assert first == again != moved


def losses_around_a_reload(arguments: list[str]) -> list[float]:
    """A batch's loss with the weights of step 2, of step 6, and of step 2 again, in one process."""
    from pathlib import Path

    import torch

    from bifrost.trainer.checkpoint.reader import CheckpointReader
    from bifrost.trainer.checkpoint.state import reload
    from bifrost.trainer.optim import engine
    from bifrost.trainer.training import loop

    losses = []
    forward, run = engine.Engine.forward, loop.run
    held = {}

    def watched_forward(self, batch):
        held.setdefault("batch", batch)
        return forward(self, batch)

    def loss(engine) -> float:
        with torch.no_grad():
            return float(engine.model(**held["batch"]).loss)

    def watched_run(parts, progress):
        after_step = parts.after_step

        def look(progress):
            after_step(progress)
            if progress.step in (2, 6):
                losses.append(loss(parts.engine))
            if progress.step == 6:
                reload(parts.engine, parts.ema, CheckpointReader(Path(folder) / "checkpoints/step-00000002"))
                losses.append(loss(parts.engine))

        parts.after_step = look
        return run(parts, progress)

    folder = next(a for a in arguments if a.startswith("runs_dir=")).partition("=")[2] + "/tiny-mllm"
    engine.Engine.forward, loop.run = watched_forward, watched_run
    ranked.succeed(arguments)
    return losses
