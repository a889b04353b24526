"""Ctrl-C: answered at once in every phase, one line, exit code 130 where nothing is saved, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from bifrost.slurm.exit_codes import INTERRUPTED, STOPPED
from bifrost.trainer.distributed.run_lock import RunLock
from bifrost.trainer.monitors.metrics import read_metrics
from bifrost.trainer.report.files import run_state

# A launcher whose two ranks never look at Ctrl-C: whatever it does, it does alone.
LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
from functools import partial
from bifrost.trainer.distributed import launcher as launch
from bifrost.trainer.monitors.metrics import record_interruption

RANK = '''
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
if sys.argv[2]:
    open(sys.argv[1], "w").write(sys.argv[2])
os.write(1, (str(os.getpid()) + os.linesep).encode())  # one write: the ranks share a pipe
time.sleep(60)
'''
phase, trains = sys.argv[1], sys.argv[2] == "trains"
launch._start = lambda rank, ranks, arguments, family: subprocess.Popen(
    [sys.executable, "-c", RANK, str(family.phase_file), phase], start_new_session=True)
run = Path(sys.argv[3])
at_quit = partial(record_interruption, run / "metrics.jsonl")
sys.exit(launch.run_ranks(2, [], run, at_quit) if trains else launch.run_ranks(2, []))
"""


class Started:
    """A process with its standard error as it comes, and the two ranks that it has started."""

    def __init__(self, phase: str, run: str = "no such folder", trains: str = "trains") -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", LAUNCHER, phase, trains, run]
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        self.ranks = [int(self.process.stdout.readline()) for _ in range(2)]

    def press(self) -> str:
        """The line that Ctrl-C is answered with, within a fraction of a second."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        line = self.process.stderr.readline().strip()
        assert time.monotonic() - begun < 1
        return line

    def ended(self, within_s: float = 3) -> int:
        """The exit code; nothing more is said, and no rank is left."""
        begun = time.monotonic()
        out, err = self.process.communicate(timeout=30)
        assert (out, err) == ("", "") and time.monotonic() - begun < within_s
        assert not any(Path(f"/proc/{rank}").exists() for rank in self.ranks)
        return self.process.returncode


def test_a_quit_is_recorded_as_the_end_of_the_attempt(tmp_path: Path) -> None:
    """The ranks are killed, one of them within a line; the run has not failed. A second attempt begins like any."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"time": 1, "event": "start", "step": 0}\n{"time": 2, "step": 7}\n{"time": 3, "st')
    started = Started("training", str(tmp_path))
    started.press()
    started.press()
    assert started.ended(1) == INTERRUPTED
    end = read_metrics(metrics)[-1]
    assert (end["event"], end["step"], end["outcome"]) == ("end", 7, "interrupted")
    assert run_state(read_metrics(metrics), tmp_path, end["time"])[0] == "interrupted"
    before = metrics.read_bytes()
    for phase in ("", "ending"):  # nothing begun; an end that the ranks have recorded
        started = Started(phase, str(tmp_path))
        started.press()
        if phase:
            started.press()
        assert started.ended() == INTERRUPTED and metrics.read_bytes() == before


def test_before_the_first_step_ctrl_c_ends_at_once() -> None:
    started = Started("")
    assert started.press() == "interrupted before the first step; there was nothing to save"
    assert started.ended() == INTERRUPTED


def test_while_training_the_first_ctrl_c_saves_and_the_second_ends() -> None:
    started = Started("training")
    assert started.press() == "saving; press Ctrl-C again to quit without saving"
    with pytest.raises(subprocess.TimeoutExpired):
        started.process.wait(1.5)  # a save may take as long as it likes
    assert started.press() == "quit without saving; the same command continues from the last checkpoint"
    assert started.ended() == INTERRUPTED


@pytest.mark.parametrize("ours", [True, False])
def test_the_lock_of_ranks_that_were_killed_goes_with_them(tmp_path: Path, ours: bool) -> None:
    started = Started("", str(tmp_path / "run"))
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    text = (tmp_path / "run" / "lock.json").read_text()
    if ours:
        (tmp_path / "run" / "lock.json").write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {started.ranks[0]}'))
    started.press()
    assert started.ended() == INTERRUPTED
    assert (tmp_path / "run").exists() is not ours
    lock.release()


def test_when_all_is_saved_ctrl_c_says_so() -> None:
    started = Started("ending")
    assert started.press() == "all is saved; not waiting for MLflow any longer"
    assert started.press() == "quit; all is saved"
    assert started.ended() == INTERRUPTED


def test_ranks_that_save_nothing_end_with_the_first() -> None:
    started = Started("training", trains="does not train")
    assert started.press() == "interrupted"
    assert started.ended() == INTERRUPTED


def test_other_stop_signals_are_the_ranks_to_act_on() -> None:
    started = Started("training")
    started.process.send_signal(signal.SIGTERM)
    assert started.ended() == STOPPED


STUBBORN = """
import os, sys, threading, time
sys.argv = ["bifrost", *sys.argv[1:]]
from bifrost.trainer.distributed.interrupt import end_on_interrupt
end_on_interrupt()
threading.Thread(target=time.sleep, args=(60,)).start()
child = os.fork() == 0
os.write(1, b"ready\\n")
if child:
    time.sleep(60)
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("eval --out x", "interrupted"),
        ("data verify x", "interrupted"),
        ("data ingest a b", "interrupted; the same command continues where it stopped"),
        ("generate --out x", "interrupted; the same command continues where it stopped"),
    ],
)
def test_a_command_ends_within_a_second_whatever_it_is_at(arguments: str, line: str) -> None:
    """Threads that keep running, code that swallows every exception, forked processes that get the same Ctrl-C."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, *arguments.split()],
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    assert process.stderr.readline() == line + "\n"
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (INTERRUPTED, "", "") and time.monotonic() - begun < 3


@pytest.mark.slow
def test_an_interrupted_ingest_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with runs.launched(["data", "demo", str(out)], stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        while not list(out.glob("*.tar.tmp-*")):
            assert process.poll() is None
            time.sleep(0.01)
        family = runs.children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    *_, line = err.splitlines()
    assert line == "interrupted; the same command continues where it stopped"
    assert family
    leave(family)


def leave(family: list[int]) -> None:
    """The kernel has ended these processes, which takes it a moment."""
    deadline = time.monotonic() + 5
    while alive := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


@pytest.mark.multi
@pytest.mark.slow
def test_a_run_is_quit_in_the_middle_of_training(shards: Path, tmp_path: Path) -> None:
    """Twice Ctrl-C: the checkpoint before it stays, and neither lock nor process is left."""
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "checkpoint.every=1", "data.workers=1", "--ranks", "1")
    run = tmp_path / "tiny-mllm"
    with runs.launched(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        runs.wait_for_steps(run, 3)
        ranks = runs.children(launcher.pid)
        family = [*ranks, *(worker for rank in ranks for worker in runs.children(rank))]
        assert len(family) >= 2
        launcher.send_signal(signal.SIGINT)
        assert launcher.stderr
        while "press Ctrl-C again" not in (line := launcher.stderr.readline()):
            assert line.startswith("WARNING: the save"), line  # on a busy machine, saves at every step are slow
        launcher.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == INTERRUPTED and err.startswith("quit without saving") and err.count("\n") == 1
    assert time.monotonic() - begun < 5
    # Stopped: a rank busy for both presses takes them as one, and may still save in the time that it has left.
    assert run_state(read_metrics(run / "metrics.jsonl"), run, time.time())[0] in ("interrupted", "stopped")
    leave(family)
    assert not (run / "lock.json").exists()
    saved = [path for path in (run / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert saved and all((path / "manifest.json").exists() for path in saved)
