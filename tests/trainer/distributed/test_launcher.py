"""A module that a command runs in a process of its own: its lines, its progress, its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bifrost.data import progress
from bifrost.slurm.exit_codes import INTERRUPTED
from bifrost.trainer.distributed import launcher
from bifrost.trainer.distributed.launcher import run_child

COUNTING = """
import sys, time
print("3 builds of kernels", flush=True)
for number in range(3):
    time.sleep(0.1)
    print("built", number, flush=True)
print("a table", flush=True)
time.sleep(0.1)
sys.exit(7)
"""


def test_its_lines_come_as_they_are_and_count_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.04)
    assert run_child("counting", counts="kernels") == 7
    out, err = capfd.readouterr()
    assert out.splitlines() == ["3 builds of kernels", "built 0", "built 1", "built 2", "a table"]
    assert "compiling: 1 of 3 kernels, " in err and " left" in err and "4 of 3" not in err


RUNNING = """
import sys
from bifrost.trainer.distributed.interrupt import end_on_interrupt
from bifrost.trainer.distributed import launcher as launch
from bifrost.trainer.distributed.launcher import run_child
end_on_interrupt()
sys.exit(run_child("sleeping"))
"""


def test_ctrl_c_ends_it_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text("import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)")
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = subprocess.Popen([sys.executable, "-c", RUNNING], stdout=pipe, stderr=pipe, text=True, env=environment)
    assert command.stdout
    child = int(command.stdout.readline())
    begun = time.monotonic()
    command.send_signal(signal.SIGINT)
    assert command.communicate(timeout=30) == ("", "interrupted\n") and command.returncode == INTERRUPTED
    assert time.monotonic() - begun < 3 and not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("number", "trains", "said"),
    [
        (
            signal.SIGKILL,
            True,
            "SIGKILL, mostly for lack of memory: lower micro_batch or data.workers; the same command",
        ),
        (signal.SIGSEGV, True, "SIGSEGV; the same command continues from the last checkpoint"),
        (signal.SIGKILL, False, "SIGKILL, mostly for lack of memory: start fewer ranks\n"),
        (signal.SIGRTMIN + 1, False, f"signal {signal.SIGRTMIN + 1}\n"),
    ],
)
def test_a_rank_that_dies_of_a_signal_is_named(
    number: int, trains: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The others' errors are of lost connections, which name nobody."""

    def start(rank: int, *_: object) -> subprocess.Popen:
        end = f"os.kill(os.getpid(), {int(number)})" if rank == 1 else "sys.exit(1)"
        return subprocess.Popen([sys.executable, "-c", f"import os, sys; {end}"])

    monkeypatch.setattr(launcher, "_start", start)
    assert launcher.run_ranks(2, [], tmp_path if trains else None) == -number
    assert f"error: rank 1 was ended by {said}" in capfd.readouterr().err


def ended_as(monkeypatch: pytest.MonkeyPatch, *ends: str) -> int:
    """The launcher's exit code for ranks that run these lines of Python."""

    def start(rank: int, ranks: int, arguments: object, family: launcher._Family) -> subprocess.Popen:
        lost = launcher.lost_file(family.phase_file, rank)
        return subprocess.Popen([sys.executable, "-c", f"import os, sys; lost = {str(lost)!r}; {ends[rank]}"])

    monkeypatch.setattr(launcher, "_start", start)
    return launcher.run_ranks(len(ends), [], Path("none"))


LOSES = "open(lost, 'w').write('lost a rank'); sys.exit(1)"


def test_ranks_that_lost_each_other_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert ended_as(monkeypatch, LOSES, LOSES) == 1
    assert capfd.readouterr().err == "lost a rank\n"


def test_a_rank_that_failed_by_itself_has_said_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert ended_as(monkeypatch, LOSES, "sys.exit('its own error')") == 1
    assert capfd.readouterr().err == "its own error\n"


def test_ranks_that_nccl_aborts_do_not_hide_the_one_that_was_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert ended_as(monkeypatch, "os.abort()", "os.kill(os.getpid(), 9)", LOSES) == -signal.SIGKILL
    assert capfd.readouterr().err.startswith("error: rank 1 was ended by SIGKILL")


def test_a_signal_before_training_began_is_reported_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Ranks that leave the rendezvous cannot know which of them may print the line."""
    assert ended_as(monkeypatch, "os.kill(os.getppid(), 15); sys.exit(75)", "sys.exit(75)") == 75
    assert capfd.readouterr().err.startswith("stopped by SIGTERM before training began; there was nothing to save")
