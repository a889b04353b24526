"""When a rank asks for a stop; what the ranks make of it is shown by tests/trainer/test_stop.py."""

import signal

import pytest

from bifrost.slurm.record import stop_s
from bifrost.trainer.monitors.stop import StopSignals


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopSignals:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return StopSignals()


def test_a_rank_without_a_limit_asks_for_nothing(stop: StopSignals) -> None:
    assert stop.asked() is None
    stop.received = signal.SIGUSR1
    assert stop.asked() == "SIGUSR1"


def test_time_is_kept_for_a_stop_as_long_as_it_was_measured(stop: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[float] = []
    now = [1000.0]
    monkeypatch.setattr("bifrost.trainer.monitors.stop.time.time", lambda: now[0])
    stop.end_before(2000.0, lambda: stop_s(10.0, saves) or 120.0)
    for now[0] in (1000.0, 1879.0):
        assert stop.asked() is None
    saves += [200.0, 90.0]
    for now[0], late in ((1579.0, False), (1581.0, True)):
        assert (stop.asked() == "the job's time limit") == late, now
    saves[:] = [1.0]
    assert stop.asked(), "other ranks have heard it"


def test_no_less_is_kept_than_slurm_makes_sense_of() -> None:
    assert stop_s(0.1, [0.1]) == 60 and stop_s(None, [1.0]) is stop_s(1.0, []) is None
