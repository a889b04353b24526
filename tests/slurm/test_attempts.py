"""Requeue decisions by the exit of the ranks: real Slurm, with a line of shell in place of the ranks."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from bifrost.slurm import SlurmError
from bifrost.slurm.exit_codes import FAILED, HUNG, LOCKED, LOST, STOPPED, USAGE
from clusterruns import ClusterRun, job, slurm

CHECKPOINT = 'mkdir -p "$BIFROST_RUN/checkpoints/step-0000000{}"'


def decisions(run: ClusterRun) -> list[str]:
    return [attempt["decision"] for attempt in run.attempts()]


@pytest.mark.slow
def test_a_job_is_requeued_until_done(run: ClusterRun) -> None:
    """One rank's exit code ends the step on all nodes; the job keeps its id through the requeues."""
    # Slurm ends the step when the first rank exits. The other ignores SIGTERM and exits itself, as in training.
    save = "trap '' TERM; " + CHECKPOINT.format(1)
    hung = f'[ "$SLURM_PROCID" = 1 ] && exit {HUNG}; sleep 60'
    run.stand_in(
        f"{save}; exit {STOPPED}",
        hung,
        f"fail {LOST} 'the storage is away'",
        "echo $BIFROST_ENDS_AT > $BIFROST_RUN/end",
    )
    number = run.submit("--time", "60")
    run.wait_for_end()
    assert 3000 < float((run.run / "end").read_text()) - time.time() <= 3600
    assert decisions(run) == ["again", "again", "again", "done"]
    assert [attempt["step"] for attempt in run.attempts()] == [0, 1, 1, 1]
    assert job(number)["Restarts"] == "3" and job(number)["JobState"] == "COMPLETED"
    assert "stopped by a signal, saved: requeued, from step 1" in run.log()
    assert "the storage is away: requeued, from step 1" in run.log() and "pending execution" not in run.log()
    goodput = {"ettr": 0.75, "wall_s": 200.0, "seconds": {"step": 150.0, "save": 50.0}}
    (run.run / "goodput.json").write_text(json.dumps(goodput))
    status = run.bifrost("status", str(run.run))
    assert "done: all steps are done" in status
    assert "75.0% of 200 s since the first attempt (step 75.0%, save 25.0%)" in status


@pytest.mark.parametrize(
    ("attempt", "code", "reason"),
    [
        (f"fail {USAGE} 'no such shards'", USAGE, "no such shards"),
        (f"fail {LOCKED} 'another process owns the run'", LOCKED, "another process owns the run"),
        # The rank that records its reason counts, not those that end because of it.
        (
            f"[ $SLURM_PROCID = 1 ] && fail {FAILED} 'too many bad steps'; sleep 5; kill -9 $$",
            FAILED,
            "rank 1: too many bad steps",
        ),
    ],
)
def test_a_job_that_is_not_requeued(run: ClusterRun, attempt: str, code: int, reason: str) -> None:
    run.stand_in(attempt)
    number = run.submit()
    run.wait_for_end()
    assert decisions(run) == ["stopped"]
    assert run.stopped()["code"] == code and reason in run.stopped()["reason"]
    assert job(number)["JobState"] == "FAILED" and job(number)["Restarts"] == "0"
    assert reason in run.bifrost("status", str(run.run))


@pytest.mark.slow
def test_a_crash_loop_stops(run: ClusterRun) -> None:
    """Three attempts without a new checkpoint; those before the last checkpoint do not count."""
    run.stand_in("kill -9 $$", f"{CHECKPOINT.format(3)}; kill -9 $$", *["kill -9 $$"] * 5)
    run.submit()
    run.wait_for_end()
    assert [attempt["step"] for attempt in run.attempts()] == [0, 0, 3, 3, 3]
    assert decisions(run) == ["again"] * 4 + ["stopped"]
    assert run.stopped()["reason"].startswith("3 attempts without a checkpoint after step 3")
    assert run.stopped()["reason"] in run.bifrost("status", str(run.run))
    # After a fix and a new submission the count restarts.
    run.stand_in(*["kill -9 $$"] * 5, "true")
    run.jobs.append(run.bifrost("resume", str(run.run)).strip())
    assert not (run.run / "stopped.json").exists()
    run.wait("start", lambda: len(run.attempts()) == 6)
    run.wait_for_end()
    assert decisions(run)[5:] == ["done"]


def test_requeues_by_slurm_itself_count_too(run: ClusterRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm requeues a job that lost a node without running the script's last step: the next attempt counts it."""
    run.stand_in("true")
    monkeypatch.setenv("SLURM_JOB_ID", run.submit())
    run.wait_for_end()
    (run.run / "slurm" / "attempts.jsonl").unlink()
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert run.bifrost("before", str(run.run)).startswith("2 ")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(SlurmError, match="3 attempts without a checkpoint after step 0"):
        run.bifrost("before", str(run.run))
    assert "3 attempts without" in run.stopped()["reason"]


def test_without_requeue_a_new_job_continues(run: ClusterRun) -> None:
    run.stand_in(f"{CHECKPOINT.format(1)}; exit {STOPPED}", "true", requeue=False)
    first = run.submit()
    run.wait_for_end()
    second = json.loads((run.run / "slurm" / "job.json").read_text())["id"]
    assert decisions(run) == ["again", "done"] and int(second) == int(first) + 1
    assert job(second)["JobState"] == "COMPLETED" and job(first)["Restarts"] == "0"


def test_an_array_is_a_chain(run: ClusterRun) -> None:
    run.stand_in(f"{CHECKPOINT.format(1)}; exit {STOPPED}", "true", "true")
    number = run.submit("--array", "1-4%1")
    run.wait_for_end()
    assert decisions(run) == ["again", "done"]
    states = re.findall(r"ArrayTaskId=(\S+) .*?JobState=(\w+)", slurm("scontrol", "-o", "show", "job", number))
    assert sorted(states)[:2] == [("1", "FAILED"), ("2", "COMPLETED")]
    assert {state for _, state in sorted(states)[2:]} == {"CANCELLED"}


def test_a_second_job_of_a_run_is_refused(run: ClusterRun) -> None:
    run.stand_in("sleep 100", "true")
    number = run.submit()
    with pytest.raises(SlurmError, match=rf"job {number} of this run is (PENDING|RUNNING); .*cancel"):
        run.submit()
    with pytest.raises(SlurmError, match=f"job {number} of this run"):
        run.bifrost("resume", str(run.run))
    assert slurm("squeue", "-h", "-o", "%i") == number
    run.wait("start", run.attempts)
    assert re.search(rf"job +{number} RUNNING, .* on node\[1-2\]", run.bifrost("status", str(run.run)))


def test_a_request_above_the_partition_is_refused_before_anything_is_written(run: ClusterRun) -> None:
    run.stand_in("true")
    with pytest.raises(SlurmError, match=r"sbatch: allocation failure: .* it would never start"):
        run.submit("micro_batch=1", nodes="4")
    assert not run.run.exists() and not slurm("squeue", "-h")


def test_leftover_launcher_variables_do_not_reach_the_job(run: ClusterRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stand_in('echo "$SLURM_PROCID: ${RANK-}${WORLD_SIZE-}${LOCAL_RANK-} $MASTER_ADDR" >> $BIFROST_RUN/left')
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "gone"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_EXPORT", "ALL")
    run.submit()
    run.wait_for_end()
    # The cluster's prolog sets this machine's address.
    assert sorted((run.run / "left").read_text().splitlines()) == [f"{task}:  127.0.0.1" for task in range(4)]


def test_cancel_saves_and_ends_the_run(run: ClusterRun) -> None:
    run.stand_in(f"trap 'touch $BIFROST_RUN/saved; exit {STOPPED}' USR1; touch $BIFROST_RUN/going; while :; do :; done")
    run.submit()
    run.wait("rank", lambda: (run.run / "going").exists())
    assert "save and stop" in run.bifrost("cancel", str(run.run))
    run.wait_for_end()
    assert decisions(run) == ["cancelled"] and (run.run / "saved").exists()
    with pytest.raises(SlurmError, match="is not pending or running"):
        run.bifrost("cancel", str(run.run))


def test_cancel_now(run: ClusterRun) -> None:
    run.stand_in("sleep 100", "true")
    number = run.submit()
    run.wait("start", run.attempts)
    run.bifrost("cancel", str(run.run), "--now")
    run.wait("end", lambda: job(number)["JobState"] == "CANCELLED")
    assert len(run.attempts()) == 1


def test_logs(run: ClusterRun, capfd: pytest.CaptureFixture[str]) -> None:
    run.stand_in("echo output of rank $SLURM_PROCID; sleep 2; echo and again")
    with pytest.raises(SlurmError, match="no such run folder"):
        run.bifrost("status", str(run.run))
    run.submit()
    run.wait("output", lambda: "output of" in run.log())
    command = [sys.executable, "-m", "bifrost.slurm", "logs", str(run.run), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout
        seen = ""
        while "and again" not in seen:
            seen += follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
    assert "output of rank 1" in seen
    run.wait_for_end()
    run.bifrost("logs", str(run.run), "--lines", "1")
    assert capfd.readouterr().out == "bifrost: done: all steps are done\n"
