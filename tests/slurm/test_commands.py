"""Slurm's commands with a controller that does not answer, replaced by shell scripts."""

from pathlib import Path

import pytest

from bifrost.slurm import SlurmError, commands
from bifrost.slurm.pending import explained
from clusterruns import Stand, failing

SHOWN = "JobId=7 JobState=RUNNING Reason=None RunTime=00:01 EndTime=2026-01-01T00:00:10 ExcNodeList=n[1-2]"
BUSY = "slurm_load_jobs error: Socket timed out on send/recv operation"


def test_a_command_is_retried_until_the_controller_answers(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    calls = stand("scontrol", failing(BUSY), failing("Unable to contact slurm controller"), f"echo {SHOWN}")
    state = commands.job_state("7")
    assert state and (state.state, state.excluded, state.nodes) == ("RUNNING", "n[1-2]", "")
    assert state.ends_at and round(state.ends_at) % 60 == 10
    assert len(calls()) == 3
    assert caplog.text.count("Socket timed out") == 1, "logged once"


def test_a_controller_that_never_answers(stand: Stand) -> None:
    calls = stand("scontrol", failing(BUSY))
    with pytest.raises(SlurmError, match="Socket timed out"):
        commands.requeue("7")
    assert len(calls()) > 2


def test_a_command_that_hangs(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt times out, and so do all attempts together."""
    monkeypatch.setattr(commands, "ANSWER_S", 0.3)
    calls = stand("scontrol", "exec sleep 60", f"echo {SHOWN}")
    state = commands.job_state("7")
    assert state and state.state == "RUNNING" and len(calls()) == 2
    monkeypatch.setattr(commands, "GIVE_UP_S", 0.0)
    monkeypatch.setattr(commands, "PATIENCE_S", 1000.0)
    calls = stand("scontrol", "exec sleep 60")
    with pytest.raises(SlurmError, match=r"^scontrol: no answer within 0 s; see scontrol ping$"):
        commands.requeue("7")


def test_a_refusal_is_not_retried(stand: Stand) -> None:
    calls = stand("scontrol", failing("slurm_load_jobs error: Invalid job id specified"))
    assert commands.job_state("7") is None
    stand("scontrol", failing("Requested operation is presently disabled for job 7"))
    with pytest.raises(SlurmError, match="disabled"):
        commands.requeue("7")
    assert len(calls()) == 2


def test_a_requeue_whose_reply_was_lost(stand: Stand) -> None:
    calls = stand("scontrol", failing(BUSY), failing("Job is pending execution for job 7"))
    commands.requeue("7")
    assert calls() == ["requeue 7"] * 2


def test_a_successor_job_is_submitted_once(stand: Stand) -> None:
    """The controller accepted the first submission, but its reply was lost."""
    calls = stand("sbatch", failing(BUSY), "echo 9")
    stand("squeue", "echo '6 (null)'; echo '8 afterany:7(unfulfilled)'; echo '10 afterany:77(unfulfilled)'")
    assert commands.submit(Path("job.sh"), after="7") == "8"
    assert len(calls()) == 1
    assert commands.submit(Path("job.sh"), after="7") == "9"


def test_a_submission_by_a_user_fails_at_once(stand: Stand) -> None:
    calls = stand("sbatch", failing("sbatch: error: Batch job submission failed: Unspecified error"))
    with pytest.raises(SlurmError, match="Unspecified"):
        commands.submit(Path("job.sh"))
    assert len(calls()) == 1


UNAVAILABLE = failing("allocation failure: Requested node configuration is not available")


@pytest.mark.parametrize(
    ("tested", "nodes", "least", "problem"),
    [
        ("true", "", 4, None),
        (UNAVAILABLE, "main* idle 2", 4, "not available; it would never start: see sinfo, and request less"),
        # Nodes of other partitions do not count.
        (UNAVAILABLE, "main* idle 2; echo other down 9", 4, "it would never start"),
        (UNAVAILABLE, "main* idle 2; echo main* drained 1", 4, "it would never start"),
        # Nodes that are down may return.
        (UNAVAILABLE, "main* idle 2; echo main* down* 2", 4, None),
        (
            failing("error: invalid partition specified: x"),
            "main; echo gpu; echo main",
            1,
            "^sbatch: invalid partition specified: x; give --partition as one of gpu, main$",
        ),
        (
            failing("allocation failure: Invalid generic resource (gres) specification"),
            "",
            1,
            "Invalid generic .* on a CPU cluster give --gpus-per-node 0 --tasks-per-node N$",
        ),
        (
            failing(
                "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
                "sbatch: fatal: Could not establish a configuration source"
            ),
            "",
            1,
            r"^sbatch: Could not establish a configuration source; check SLURM_CONF \(.*\) and scontrol ping$",
        ),
        (
            failing("error: Unable to contact slurm controller (connect failure)"),
            "",
            1,
            r"^sbatch: Unable to contact slurm controller \(connect failure\); check SLURM_CONF",
        ),
        (failing(BUSY), "", 1, None),
    ],
)
def test_a_request_that_would_never_start_is_refused(
    stand: Stand, tested: str, nodes: str, least: int, problem: str | None
) -> None:
    stand("sbatch", tested)
    stand("sinfo", f"set -f; echo {nodes}")
    if problem is None:
        commands.check_request("#!/bin/bash", None, least)
    else:
        with pytest.raises(SlurmError, match=problem):
            commands.check_request("#!/bin/bash", None, least)


def test_a_wrong_partition_without_an_answer_from_sinfo(stand: Stand) -> None:
    stand("sbatch", failing("error: invalid partition specified: x"))
    stand("sinfo", failing(BUSY))
    with pytest.raises(SlurmError, match=r"^sbatch: invalid partition specified: x$"):
        commands.check_request("#!/bin/bash", None, 1)


def test_pending_reasons_are_explained() -> None:
    assert explained("PartitionNodeLimit").startswith("PartitionNodeLimit: above the partition's node limit")
    assert "down or drained" in explained("ReqNodeNotAvail,_UnavailableNodes:node2")
    assert explained("QOSMaxNodePerUserLimit") != explained("QOSGrpNodeLimit")
    assert explained("SomethingNew") == "SomethingNew"
