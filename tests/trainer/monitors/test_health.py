"""The judge of loss and gradient norm: what is a spike, and that nothing bad ever moves what it is measured against."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from bifrost.recipes.schema import Health as Settings
from bifrost.trainer.monitors.health import FLOOR, Health, robust_zscore
from bifrost.trainer.optim.train_state import TrainState

numbers = st.floats(0.01, 100)
bad = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(1e4, 1e30))


def judged(health: Health, loss: float, grad_norm: float) -> str | None:
    """What the loop does with a step."""
    reason = health.judge(loss, grad_norm)
    health.record(reason is not None, loss, grad_norm)
    return reason


def settled(count: int = 16, **values: float) -> Health:
    """After `count` good steps around loss 2 and gradient norm 0.5."""
    health = Health(Settings(window=16, **values), TrainState())
    draw = np.random.default_rng(0)
    for _ in range(count):
        assert judged(health, 2 + 0.1 * draw.standard_normal(), 0.5 + 0.05 * draw.standard_normal()) is None
    return health


@given(st.lists(numbers, min_size=1, max_size=60), numbers)
@settings(max_examples=200, deadline=None)
def test_zscore_is_the_published_one(window: list[float], value: float) -> None:
    scale = max(median_abs_deviation(window, scale="normal"), FLOOR * np.median(window) / 0.6745)
    assert robust_zscore(value, window) == pytest.approx((value - np.median(window)) / scale, rel=2e-4)


@given(st.lists(st.tuples(st.booleans(), bad), max_size=40), st.sampled_from(["loss", "gradient norm", "both"]))
@settings(max_examples=100, deadline=None)
def test_bad_values_leave_no_trace(sequence: list[tuple[bool, float]], which: str) -> None:
    """However many bad steps come between, good ones are judged as if there had been none."""
    with_bad, without = settled(), settled()
    for good, value in sequence:
        if good:
            assert judged(with_bad, 2.05, 0.52) == judged(without, 2.05, 0.52)
        else:
            loss = 2.0 if which == "gradient norm" else value
            norm = 0.5 if which == "loss" else value
            assert judged(with_bad, loss, norm)
    assert with_bad.progress.accepted == without.progress.accepted
    assert with_bad.progress.skipped_steps == sum(not good for good, _ in sequence)


def test_what_is_bad_is_named() -> None:
    health = settled()
    assert judged(health, math.nan, 0.5) == "loss is nan"
    assert judged(health, 2.0, math.inf) == "gradient norm is inf"
    assert "loss 20 is a spike" in (judged(health, 20.0, 0.5) or "")
    assert "gradient norm 9 is a spike" in (judged(health, 2.0, 9.0) or "")
    assert judged(health, 0.01, 0.001) is None, "a low value is not a spike"
    assert health.progress.bad_in_a_row == 0 and health.progress.skipped_steps == 4


def test_no_verdict_before_half_the_window() -> None:
    assert judged(settled(7), 20.0, 0.5) is None
    assert judged(settled(8), 20.0, 0.5)
    assert judged(settled(7), math.nan, 0.5), "what is not finite is bad from the first step on"


def test_null_judges_finiteness_alone() -> None:
    assert judged(settled(spike_zscore=None), 1e6, 1e6) is None  # pyright: ignore
    assert judged(settled(spike_zscore=None), math.inf, 1.0)  # pyright: ignore


def test_nearly_equal_values_make_no_spike_of_a_small_step() -> None:
    health = Health(Settings(window=16), TrainState())
    for _ in range(16):
        judged(health, 2.0, 0.5)
    assert judged(health, 2.2, 0.55) is None
    assert judged(health, 3.0, 0.5)


def test_a_slow_change_of_level_is_followed() -> None:
    health = settled()
    draw = np.random.default_rng(1)
    for step in range(400):
        level = 1.02 ** min(step, 200)  # fifty times as high in the end
        assert judged(health, level * (2 + 0.1 * draw.standard_normal()), level * 0.5) is None


def test_exhausted_after_so_many_in_a_row() -> None:
    health = settled(max_bad_steps=3)
    for loss in (50.0, math.nan, 2.0, 50.0, math.nan):
        judged(health, loss, 0.5)
        assert not health.exhausted
    judged(health, 60.0, 0.5)
    assert health.exhausted
    assert (health.progress.bad_in_a_row, health.progress.spikes_in_a_row) == (3, 2)


def test_a_resume_makes_the_same_decisions() -> None:
    """Through the JSON of a checkpoint, to the bit."""
    health = settled()
    resumed = Health(health.settings, TrainState(**json.loads(json.dumps(asdict(health.progress)))))
    for loss in (2.0, 9.0, 2.1):
        assert judged(resumed, loss, 0.5) == judged(health, loss, 0.5)
    assert asdict(resumed.progress) == asdict(health.progress)


def test_an_older_checkpoint_stands_at_its_step() -> None:
    old = {"step": 7, "samples": 56, "skipped_steps": 1, "bad_in_a_row": 0, "digest": "ab"}
    assert TrainState(**old).batch == 7
    assert TrainState(**old).accepted == []
