"""Training on the cluster: requeues do not change a run's results."""

import json
import signal
import time
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.slurm import devcluster
from clusterruns import ClusterRun, job, slurm

pytestmark = [pytest.mark.multi, pytest.mark.slow]


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 20 uninterrupted steps on four ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended = ranked.bifrost(4, *runs.arguments(shards, folder, "steps=20", *runs.TINY))
    assert [rank.code for rank in ended] == [0] * 4, ended[0].err
    return runs.losses(folder / "tiny-mllm")


def test_a_signal_on_one_node(run: ClusterRun, uninterrupted: list[float]) -> None:
    """One checkpoint at an agreed step, a requeue, and the losses of an uninterrupted run, to the bit."""
    number = run.submit("steps=20", "--time", "60")
    run.wait_for_step(3)
    for process in run.ranks_on("node2"):
        process.send_signal(signal.SIGUSR1)
    run.wait_for_end()
    first, second = run.attempts()
    assert first["decision"] == "again" and second["decision"] == "done"
    assert 0 < first["step"] + second["step"] < 20, "stopped before the last step"
    assert job(number)["JobState"] == "COMPLETED" and job(number)["Restarts"] == "1"
    assert runs.losses(run.run) == uninterrupted
    assert run.log().count("ranks       0-1  node1  2 x cpu\nranks       2-3  node2  2 x cpu\n") == 2


def test_a_time_limit(run: ClusterRun) -> None:
    """Slurm signals the ranks in time, and the next attempt resumes at the step they saved."""
    run.submit("steps=100000", "--time", "3")
    run.wait("requeue", lambda: len(run.attempts()) == 2)
    saved = run.attempts()[1]["step"]
    # On a busy machine the limit may expire while the ranks exit: the job is requeued regardless.
    assert saved > 0 and run.attempts()[0]["decision"] == "again"
    assert runs.events(run.run, "end")[0]["outcome"] == "stopped"
    run.wait_for_step(saved + 1)
    assert [event["step"] for event in runs.events(run.run, "start")] == [0, saved]
    run.bifrost("cancel", str(run.run))


def test_a_lost_node(run: ClusterRun, uninterrupted: list[float]) -> None:
    """Fewer nodes, then all again: the same samples, and the same losses up to summation order."""
    number = run.submit("steps=20", "checkpoint.every=5", nodes="1-2")
    run.wait_for_step(6)
    devcluster.kill(devcluster.processes(run.cluster, "node2"))
    run.wait("start on one node", lambda: [attempt["nodes"] for attempt in run.attempts()] == [2, 1])
    devcluster.start_node(run.cluster, "node2")
    run.wait("returned node", lambda: "down" not in slurm("sinfo", "-h", "-n", "node2", "-o", "%T"))
    step = run.attempts()[1]["step"]
    assert step >= 5
    run.wait_for_step(step + 2)
    slurm("scancel", "--signal=USR1", number)
    run.wait_for_end()
    nodes = [attempt["nodes"] for attempt in run.attempts()]
    # The returned node receives the kill of the first attempt up to a minute late: it may hit the third.
    assert nodes in ([2, 1, 2], [2, 1, 2, 2])
    assert job(number)["Restarts"] == str(len(nodes) - 1)
    assert [event["ranks"] for event in runs.events(run.run, "start")][:3] == [4, 2, 4]
    assert runs.losses(run.run) == pytest.approx(uninterrupted, rel=1e-4)


def test_a_bad_node(run: ClusterRun) -> None:
    """A node on which the site's command fails is named, recorded, and excluded from the next attempt."""
    run.site(preflight=True, preflight_command='[ "$SLURMD_NODENAME" = node1 ] || { echo no disk >&2; exit 1; }')
    number = run.submit("steps=2", nodes="1-2")
    run.wait_for_end()
    first, second = run.attempts()
    assert first["excluded"] == ["node2"] and "node2" in first["reason"] and "no disk" in first["reason"]
    assert (first["nodes"], second["nodes"], second["decision"]) == (2, 1, "done")
    assert list(json.loads((run.run / "excluded.json").read_text())) == ["node2"]
    assert job(number)["ExcNodeList"] == "node2" and job(number)["Restarts"] == "1"
    assert "excluded" in run.bifrost("status", str(run.run))


def test_a_wrong_setting_ends_it(run: ClusterRun) -> None:
    """An error of the ranks is recorded as the reason why the run is not restarted."""
    run.submit("data.shards=/nowhere/*.tar")
    run.wait_for_end()
    assert run.stopped()["code"] == 2 and "/nowhere" in run.stopped()["reason"]
    assert len(run.attempts()) == 1 and time.time() - run.stopped()["time"] < 60
