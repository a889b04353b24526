import numpy as np
import pytest

from bifrost.recipes.schema import Checkpoint
from bifrost.trainer.checkpoint.interval import best_interval, settled
from bifrost.trainer.checkpoint.manager import CheckpointManager
from bifrost.trainer.checkpoint.store import Store
from bifrost.trainer.distributed.process_group import Group


@pytest.mark.parametrize(("blocked_s", "mtbf_s", "minutes"), [(40, 86400, 44), (5, 86400, 15)])
def test_known_intervals(blocked_s, mtbf_s, minutes):
    assert best_interval(blocked_s, 1, 1.0, mtbf_s) / 60 == pytest.approx(minutes, rel=0.05)


@pytest.mark.parametrize("blocked_s", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("step_s", [0.5, 7.0])
def test_no_other_interval_loses_less_time(blocked_s, step_s):
    """Against simulated failures: an interval that is half or twice as long loses more."""
    mtbf_s = 40_000.0
    best = best_interval(blocked_s, 0.0, step_s, mtbf_s)
    failures = np.random.default_rng(0).exponential(mtbf_s, 20_000)

    def lost(steps):
        between = steps * step_s + blocked_s
        saves = failures // between
        return (saves * blocked_s + (failures - saves * between)).sum() / failures.sum()

    assert lost(best) < min(lost(max(1, best // 2)), lost(best * 2))


def test_bounds():
    assert best_interval(0.001, 30.0, 1.0, 100.0) == 60  # half of the time no save is under way
    assert best_interval(0.001, 0.001, 100.0, 10.0) == 1
    assert settled(100, 110) == settled(100, 85) == 100
    assert (settled(100, 130), settled(100, 79)) == (130, 79)


def test_all_ranks_change_to_rank_0s_interval_at_the_same_step(tmp_path, run_ranks, slices, monkeypatch, caplog):
    shapes = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}
    settings = Checkpoint(interval="auto", every=10, keep=9)

    def work(rank, gather):
        events = []
        held = slices(rank, 2)
        saver = CheckpointManager(Store(tmp_path), settings, held, events.append, Group(rank, 2, gather), every=4)
        saver._better = lambda save: (3 if save.step < 12 else 5) + 10 * rank  # ranks measure differently
        saved = []
        for step in range(1, 26):
            if saver.due(step):
                saver.save(step, held, shapes, {}, {})
                saved.append((step, saver.every))
        saver.finish()
        return saved, [event for event in events if event["event"] == "checkpoint_interval"]

    (saved, events), (other, _) = run_ranks(2, work)
    # Starts with the previous attempt's interval; a save's measurement counts from the next save on.
    assert saved == other == [(4, 4), (8, 3), (9, 3), (12, 3), (15, 5), (20, 5), (25, 5)]
    assert events == [
        {"event": "checkpoint_interval", "step": 4, "every": 3},
        {"event": "checkpoint_interval", "step": 12, "every": 5},
    ]


def test_fixed_stays(tmp_path, slices):
    saver = CheckpointManager(Store(tmp_path), Checkpoint(every=10), slices(0, 1), print, every=4)
    assert [step for step in range(1, 31) if saver.due(step)] == [10, 20, 30]


def test_from_measured_times(tmp_path, slices, monkeypatch):
    shapes = {"layer.weight": (5, 3), "layer.bias": (3,), "scale": (), "empty": (0, 4)}
    settings = Checkpoint(interval="auto", every=10, mtbf_hours=50)
    asked = []
    monkeypatch.setattr(
        "bifrost.trainer.checkpoint.manager.best_interval", lambda *numbers: asked.append(numbers) or 1000
    )
    clock = iter(range(0, 100_000, 7))
    saver = CheckpointManager(Store(tmp_path), settings, slices(0, 1), lambda event: None, nodes=100)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for step in (10, 20):
        saver.save(step, slices(0, 1), shapes, {}, {})
        saver.wait()
    monkeypatch.undo()
    ((blocked, seconds, step_s, mtbf_s),) = asked  # the first save has no steps before it
    assert mtbf_s == 1800
    assert 0 < blocked <= seconds
    assert 0 < step_s * 10 < 100
    assert saver.every == 1000
