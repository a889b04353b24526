"""Stop signals: one step agreed by all ranks, one checkpoint, an exit code that requests a restart."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.slurm.exit_codes import STOPPED

pytestmark = pytest.mark.multi


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_stops_all_at_one_step(shards: Path, tmp_path: Path, number: int, rank: int) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "data.workers=1")
    run = tmp_path / "tiny-mllm"
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    processes = ranked.start(ranked.command, 2, arguments, folder=folder)
    runs.wait_for_steps(run, 2)
    os.kill(processes[rank].pid, number)
    ended = ranked.finish(processes, folder)
    assert [rank.code for rank in ended] == [STOPPED] * 2, ended[0].err
    last = runs.steps(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert runs.events(run, "end")[-1]["outcome"] == "stopped"


def train_until(arguments: list[str], ends_at: float) -> None:
    """Train in a job that ends at this time."""
    os.environ["BIFROST_ENDS_AT"] = str(ends_at)
    ranked.command(arguments)


def test_the_time_limit_stops_all_at_one_step(shards: Path, tmp_path: Path) -> None:
    """Before anything is timed two minutes are kept: the first steps are the last ones."""
    ended = ranked.run(train_until, 2, runs.arguments(shards, tmp_path, "steps=100000"), time.time() + 125)
    assert [rank.code for rank in ended] == [STOPPED] * 2, ended[0].err
    assert "stopped by the job's time limit" in ended[0].out
    run = tmp_path / "tiny-mllm"
    last = runs.steps(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert runs.events(run, "end")[-1]["outcome"] == "stopped"


def test_the_launcher_passes_signals_on_and_leaves_nothing_behind(shards: Path, tmp_path: Path) -> None:
    """Signals that reach every process, loader workers too, as Slurm sends them: still a checkpoint."""
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "data.workers=1", "--ranks", "2")
    pipe = subprocess.PIPE
    with runs.launched(arguments, stdout=pipe, stderr=pipe, text=True) as launcher:
        run = tmp_path / "tiny-mllm"
        runs.wait_for_steps(run, 2)
        family = descendants(launcher.pid)
        assert len(family) >= 4, "two ranks and their workers"
        for pid in [launcher.pid, *family]:
            with suppress(ProcessLookupError):  # a short-lived child, such as git
                os.kill(pid, signal.SIGTERM)
        out, err = launcher.communicate(timeout=300)
        assert launcher.returncode == STOPPED, err
        assert "stopped by SIGTERM" in out
        last = runs.steps(run)[-1]["step"]
        assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
        assert not any(Path(f"/proc/{pid}").exists() for pid in family)


def train_in_a_group(arguments: list[str]) -> None:
    """Train with the loader's workers in this rank's own process group, as the launcher starts it."""
    os.setsid()
    ranked.command(arguments)


def test_ranks_get_different_signals_with_their_workers(shards: Path, tmp_path: Path) -> None:
    """As `scancel --signal` on one node and a preemption on another: each rank's whole process group is signalled."""
    run = tmp_path / "tiny-mllm"
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "data.workers=2", *runs.TINY)
    processes = ranked.start(train_in_a_group, 2, arguments, folder=folder)
    runs.wait_for_steps(run, 2)
    first, second = (process.pid or 0 for process in processes)
    workers = [*descendants(first), *descendants(second)]
    assert len(runs.children(second)) >= 2, "its workers"
    os.killpg(second, signal.SIGUSR1)
    time.sleep(0.1)  # both have yet to save
    os.killpg(first, signal.SIGTERM)
    ended = ranked.finish(processes, folder)
    assert [rank.code for rank in ended] == [STOPPED] * 2, ended[0].err
    last = runs.steps(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_signal_while_a_run_starts(shards: Path, tmp_path: Path) -> None:
    """It is not lost: one step, one checkpoint."""
    arguments = runs.arguments(shards, tmp_path, "steps=4000")
    run = tmp_path / "tiny-mllm"
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    processes = ranked.start(ranked.command, 2, arguments, folder=folder)
    deadline = time.monotonic() + 300
    while not (run / "lock.json").exists():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.01)
    os.kill(processes[1].pid or 0, signal.SIGUSR1)
    ended = ranked.finish(processes, folder)
    assert [rank.code for rank in ended] == [STOPPED] * 2, ended[0].err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_killed_launcher_takes_its_ranks_along(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "data.workers=1", "--ranks", "2")
    with runs.launched(arguments, stdout=subprocess.DEVNULL) as launcher:
        runs.wait_for_steps(tmp_path / "tiny-mllm", 1)
        family = descendants(launcher.pid)
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 10
        while alive := [pid for pid in family if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"still running: {alive}"
            time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    return [*runs.children(pid), *(deeper for child in runs.children(pid) for deeper in descendants(child))]
