"""One live start a run: of many at once exactly one wins, and a dead owner is succeeded."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.slurm.exit_codes import LOCKED
from bifrost.trainer.distributed.run_lock import FILE, RunLock
from bifrost.trainer.errors import Locked, RunError

ACQUIRE = """
import sys, time
from pathlib import Path
from bifrost.trainer.errors import Locked
from bifrost.trainer.distributed.run_lock import RunLock
folder, start, elsewhere = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
lock = RunLock(folder, stale_s=2)
lock._owner["space"] = elsewhere[0] if elsewhere else lock._owner["space"]
time.sleep(max(0, start - time.time()))
try:
    lock.acquire()
    print("won", flush=True)
    while True:
        time.sleep(0.2)
        lock.beat(7)
except Locked as error:
    print(error, flush=True)
"""


def starts(folder: Path, count: int, hosts: int = 0) -> list[subprocess.Popen]:
    """`count` processes that try to take the lock at the same moment, as if on `hosts` hosts (0: on this one)."""
    moment = str(time.time() + 3)
    environment = {**os.environ, "PYTHONPATH": "", "SLURM_JOB_ID": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-c", ACQUIRE, str(folder), moment, *([f"node{number % hosts}"] if hosts else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(count)
    ]


def outcomes(processes: list[subprocess.Popen]) -> list[str]:
    """The line that each prints; the winner is then killed."""
    said = [process.stdout.readline().strip() for process in processes if process.stdout]
    for process in processes:
        process.kill()
        process.communicate()
    return said


@pytest.mark.parametrize("hosts", [0, 6])
def test_one_of_many_attempts_wins_also_over_a_dead_owner(tmp_path: Path, hosts: int) -> None:
    for _ in range(2):  # in the second round all find the lock of the first one's winner, which was killed
        said = outcomes(starts(tmp_path / "run", 6, hosts))
        assert said.count("won") == 1, said
        assert sum("another attempt of this run is alive: process" in line for line in said) == 5, said
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FILE]


def edited(folder: Path, **changes: object) -> None:
    """Change the owner's fields in the lock in `folder`."""
    owner = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**owner, **changes}))


def test_a_live_owner_is_named_and_its_lock_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert lock.acquire() is None
        before = (tmp_path / "run" / FILE).read_text()
        with pytest.raises(Locked, match=rf"process {os.getpid()} on .*, for [\d.]+ s; nothing was touched"):
            RunLock(tmp_path / "run").acquire()
        assert (tmp_path / "run" / FILE).read_text() == before
    assert not (tmp_path / "run").exists(), "nothing was written to the run"


def test_who_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"

    def left(**changes: object) -> None:
        (run / FILE).unlink(missing_ok=True)
        lock = RunLock(run)
        lock.acquire()
        lock.beat(41)
        edited(run, **changes)

    def taken(stale_s: float = 1000) -> dict | None:
        with RunLock(run, stale_s) as lock:
            return lock.acquire()

    left(pid=2**22 - 1)
    owner = taken()
    assert owner and owner["step"] == 41 and "its process is gone" in caplog.text
    left(born=1.0)  # another process has its id now
    assert taken()
    left(space="elsewhere")
    os.utime(run / FILE, (0, time.time() - 1001))
    assert taken() and "no heartbeat for 1001 s" in caplog.text
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left(space="elsewhere", restarts=0)
    assert taken() and "an earlier attempt of this job" in caplog.text
    for changes in ({"job": "17", "restarts": 1}, {"job": "18", "restarts": 0}):
        left(space="elsewhere", **changes)
        begun = time.monotonic()
        assert taken(stale_s=1.5), "waited for, since it may live"
        assert time.monotonic() - begun > 1
    left()
    (run / FILE).write_text("")  # its creator died before it could write
    os.utime(run / FILE, (0, time.time() - 1001))
    assert taken()


def test_two_starts_that_find_the_same_dead_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments that a race rarely hits, one after the other."""
    run = tmp_path / "run"
    with RunLock(run) as dead:
        dead.acquire()
        edited(run, pid=2**22 - 1)
        token = json.loads((run / FILE).read_text())["token"]
        # Another attempt is about to replace the lock: this one waits for it.
        (run / f"{FILE}.after-{token}").write_text("")
        late = RunLock(run)
        waiting = threading.Thread(target=late.acquire, daemon=True)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and json.loads((run / FILE).read_text())["token"] == token
        (run / f"{FILE}.after-{token}").unlink()
        waiting.join(30)
        assert json.loads((run / FILE).read_text())["token"] != token
        # It has done so, and a start that had judged the old owner before comes too late.
        edited(run, pid=2**22 - 1, token="old")
        winner, loser = RunLock(run), RunLock(run)
        judge = loser._await_death

        def judged_before(path: Path, owner: dict) -> str | None:
            reason = judge(path, owner)
            winner.acquire()
            return reason

        monkeypatch.setattr(loser, "_await_death", judged_before)
        with pytest.raises(Locked):
            loser.acquire()
        assert json.loads((run / FILE).read_text())["token"] == winner._owner["token"]
        assert [path.name for path in run.iterdir()] == [FILE]


def test_starts_that_died_while_they_took_over(tmp_path: Path) -> None:
    """Found by the campaign of kills: what they leave is succeeded at once, too, not after two minutes."""
    run, before = tmp_path / "run", FILE
    for number in range(3):  # each dies in the place of the one before
        RunLock(run).acquire() if number == 0 else (run / before).write_text((run / FILE).read_text())
        owner = json.loads((run / before).read_text())
        (run / before).write_text(json.dumps({**owner, "pid": 2**22 - 1, "token": f"{number}" * 32}))
        before = f"{FILE}.after-{f'{number}' * 32}"
    begun = time.monotonic()
    with RunLock(run) as lock:
        owner = lock.acquire()
        assert owner and owner["token"] == "0" * 32
        assert json.loads((run / FILE).read_text())["token"] == lock._owner["token"]
        assert [path.name for path in run.iterdir()] == [FILE]
    assert time.monotonic() - begun < 1


def test_an_owner_that_lost_its_lock_ends(tmp_path: Path) -> None:
    """A process that was stalled until another attempt took over must not write any more."""
    (process,) = starts(tmp_path, 1)
    assert process.stdout and process.stdout.readline() == "won\n"
    (tmp_path / "other").write_text("")
    (tmp_path / "other").replace(tmp_path / FILE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == LOCKED and "was taken over while this process was stalled" in err


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="run: File exists; move what is in its place") as caught:
        RunLock(tmp_path / "run").acquire()
    assert not caught.value.transient


def test_storage_that_is_away_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "mkdir", stale)
    with pytest.raises(RunError, match="Stale file handle; check the storage") as caught:
        RunLock(tmp_path / "run").acquire()
    assert caught.value.transient


@pytest.mark.multi
def test_a_second_attempt_of_a_run_exits(shards: Path, tmp_path: Path) -> None:
    """Fault 12 of the list: its ranks exit with one line, and the first attempt continues undisturbed."""
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "micro_batch=4")
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    first = ranked.start(ranked.command, 2, arguments, folder=folder)
    run = tmp_path / "tiny-mllm"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or not runs.steps(run):
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.05)
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*.json") if path.name not in (FILE, "goodput.json")}
    second = ranked.bifrost(2, *arguments)
    assert [rank.code for rank in second] == [LOCKED] * 2, second[0].err
    assert second[0].err.startswith(f"error: {run}: another attempt of this run is alive: process {first[0].pid} on ")
    assert len(second[0].err.splitlines()) == 1 and not second[1].err
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert len(runs.events(run, "start")) == 1
    os.kill(first[1].pid, 15)
    assert [rank.code for rank in ranked.finish(first, folder)] == [75] * 2
    assert not (run / FILE).exists()
