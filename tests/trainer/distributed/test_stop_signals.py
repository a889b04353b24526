"""When a rank asks for a stop; what the ranks make of it is shown by tests/trainer/training/test_stop.py."""

import os
import signal
import subprocess
import sys

import pytest

from bifrost.slurm.exit_record import stop_s
from bifrost.trainer.distributed.stop_signals import (
    NOT_BEGUN,
    NOTHING_YET,
    QUIT,
    QUIT_SAVED,
    SAVED,
    SAVING,
    StopSignals,
)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopSignals:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    signals = StopSignals()
    signals.joined = True
    return signals


def test_a_rank_without_a_limit_asks_for_nothing(stop: StopSignals) -> None:
    assert stop.asked() is None
    stop.received = signal.SIGUSR1
    assert stop.asked() == "SIGUSR1"


def test_time_is_kept_for_a_stop_as_long_as_it_was_measured(stop: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[float] = []
    now = [1000.0]
    monkeypatch.setattr("bifrost.trainer.distributed.stop_signals.time.time", lambda: now[0])
    stop.end_before(2000.0, lambda: stop_s(10.0, saves) or 120.0)
    for now[0] in (1000.0, 1879.0):
        assert stop.asked() is None
    saves += [200.0, 90.0]
    for now[0], late in ((1579.0, False), (1581.0, True)):
        assert (stop.asked() == "the job's time limit") == late, now
    assert stop_s(10.0, saves, 300.0) == 2 * 510, "a validation may come between the signal and the save"
    saves[:] = [1.0]
    assert stop.asked(), "other ranks know of the stop"


def test_no_less_is_kept_than_slurm_makes_sense_of() -> None:
    assert stop_s(0.1, [0.1]) == 60 and stop_s(None, [1.0]) is stop_s(1.0, []) is None


IMPORTING = """
import os, signal, sys, time, types
from bifrost.trainer.distributed.stop_signals import SIGNALS
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the launcher does
import bifrost.trainer.cli
name = "bifrost.trainer.cli.main"
sys.modules[name] = types.ModuleType(name)
sys.modules[name].__getattr__ = lambda _: (os.kill(os.getpid(), int(sys.argv[2])), time.sleep(30))
from bifrost.trainer.__main__ import start
start()
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGTERM, 75, NOT_BEGUN.format("SIGTERM")), (signal.SIGINT, 130, NOTHING_YET)],
)
@pytest.mark.parametrize("launcher", ["SLURM_STEP_ID", "BIFROST_LAUNCHER"])
def test_a_signal_during_a_ranks_imports_ends_it_at_once(
    launcher: str, number: signal.Signals, code: int, line: str
) -> None:
    names = ("RANK", "SLURM_PROCID", "BIFROST_LAUNCHER", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-c", IMPORTING, "train", str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, env={**environment, launcher: "1"}, timeout=20)
    said = [] if launcher == "BIFROST_LAUNCHER" else [line]  # our launcher prints the line itself
    assert (ended.returncode, ended.stderr.splitlines()) == (code, said)


ALONE = """
import os, signal, sys, time
from bifrost.trainer.distributed import stop_signals as stop
signals = stop.StopSignals()
signals.phase, signals.joined = sys.argv[1], True
signals.at_quit.append(lambda: os.write(1, b"lock released"))
begun = time.monotonic()
with signals.waiting() if signals.phase == stop.ENDING else stop.suppress():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3 if signals.phase == stop.ENDING else 0)
assert time.monotonic() - begun < 0.3 and signals.asked() == "SIGINT"
if sys.argv[2] == "again":
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("phase", "again", "code", "out", "err"),
    [
        ("training", "once", 75, "", [SAVING]),
        ("training", "again", 130, "lock released", [SAVING, QUIT]),
        ("ending", "once", 75, "", [SAVED]),
        ("ending", "again", 130, "lock released", [SAVED, QUIT_SAVED]),
    ],
)
def test_a_rank_without_a_launcher_answers_ctrl_c_itself(
    phase: str, again: str, code: int, out: str, err: list[str]
) -> None:
    """As under torchrun: rank 0 speaks, a wait for MLflow is cut short, the second one releases the lock and ends."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "BIFROST_LAUNCHER")}
    command = [sys.executable, "-c", ALONE, phase, again]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr.splitlines()) == (code, out, err)
    other = subprocess.run(command, capture_output=True, text=True, env={**environment, "RANK": "1"})
    assert (other.returncode, other.stdout, other.stderr) == (code, out, "")
