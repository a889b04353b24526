"""Slurm's commands where its controller does not answer: shell scripts in their place."""

from pathlib import Path

import pytest

from bifrost.slurm import SlurmError, commands
from bifrost.slurm.pending import explained
from clusterruns import Stand, failing

SHOWN = "JobId=7 JobState=RUNNING Reason=None RunTime=00:01 EndTime=2026-01-01T00:00:10 ExcNodeList=n[1-2]"
BUSY = "slurm_load_jobs error: Socket timed out on send/recv operation"


def test_a_controller_that_answers_late_is_asked_again(stand: Stand, caplog: pytest.LogCaptureFixture) -> None:
    calls = stand("scontrol", failing(BUSY), failing("Unable to contact slurm controller"), f"echo {SHOWN}")
    state = commands.job_state("7")
    assert state and (state.state, state.excluded, state.nodes) == ("RUNNING", "n[1-2]", "")
    assert state.ends_at and round(state.ends_at) % 60 == 10
    assert len(calls()) == 3
    assert caplog.text.count("Socket timed out") == 1, "said once"


def test_one_that_never_answers(stand: Stand) -> None:
    calls = stand("scontrol", failing(BUSY))
    with pytest.raises(SlurmError, match="Socket timed out"):
        commands.requeue("7")
    assert len(calls()) > 2


def test_one_that_hangs(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an answer nor an error: each try is ended, and so is the asking."""
    monkeypatch.setattr(commands, "ANSWER_S", 0.3)
    calls = stand("scontrol", "exec sleep 60", f"echo {SHOWN}")
    state = commands.job_state("7")
    assert state and state.state == "RUNNING" and len(calls()) == 2
    monkeypatch.setattr(commands, "GIVE_UP_S", 0.0)
    monkeypatch.setattr(commands, "PATIENCE_S", 1000.0)
    calls = stand("scontrol", "exec sleep 60")
    with pytest.raises(SlurmError, match=r"^scontrol: no answer within 0 s; see scontrol ping$"):
        commands.requeue("7")


def test_a_refusal_is_final(stand: Stand) -> None:
    calls = stand("scontrol", failing("slurm_load_jobs error: Invalid job id specified"))
    assert commands.job_state("7") is None
    stand("scontrol", failing("Requested operation is presently disabled for job 7"))
    with pytest.raises(SlurmError, match="disabled"):
        commands.requeue("7")
    assert len(calls()) == 2


def test_a_requeue_that_was_heard_without_an_answer(stand: Stand) -> None:
    calls = stand("scontrol", failing(BUSY), failing("Job is pending execution for job 7"))
    commands.requeue("7")
    assert calls() == ["requeue 7"] * 2


def test_a_continuation_is_submitted_once(stand: Stand) -> None:
    """The controller has taken the first one and did not come to say so."""
    calls = stand("sbatch", failing(BUSY), "echo 9")
    stand("squeue", "echo '6 (null)'; echo '8 afterany:7(unfulfilled)'; echo '10 afterany:77(unfulfilled)'")
    assert commands.submit(Path("job.sh"), after="7") == "8"
    assert len(calls()) == 1
    assert commands.submit(Path("job.sh"), after="7") == "9"


def test_a_person_is_told_at_once(stand: Stand) -> None:
    calls = stand("sbatch", failing("sbatch: error: Batch job submission failed: Unspecified error"))
    with pytest.raises(SlurmError, match="Unspecified"):
        commands.submit(Path("job.sh"))
    assert len(calls()) == 1


UNAVAILABLE = failing("allocation failure: Requested node configuration is not available")


@pytest.mark.parametrize(
    ("tested", "nodes", "least", "problem"),
    [
        ("true", "", 4, None),
        (UNAVAILABLE, "main* idle 2", 4, "not available; it would wait for ever: see sinfo, and ask for less"),
        # Of other partitions nothing follows.
        (UNAVAILABLE, "main* idle 2; echo other down 9", 4, "it would wait for ever"),
        (UNAVAILABLE, "main* idle 2; echo main* drained 1", 4, "it would wait for ever"),
        # It is not for us to say when they come back.
        (UNAVAILABLE, "main* idle 2; echo main* down* 2", 4, None),
        (failing("error: invalid partition specified: x"), "", 1, "^sbatch: invalid partition specified: x$"),
        (failing("allocation failure: Invalid generic resource (gres) specification"), "", 1, "Invalid generic"),
        (failing(BUSY), "", 1, None),
    ],
)
def test_what_would_wait_for_ever_is_refused(
    stand: Stand, tested: str, nodes: str, least: int, problem: str | None
) -> None:
    stand("sbatch", tested)
    stand("sinfo", f"set -f; echo {nodes}")
    if problem is None:
        commands.check_request("#!/bin/bash", None, least)
    else:
        with pytest.raises(SlurmError, match=problem):
            commands.check_request("#!/bin/bash", None, least)


def test_reasons_to_wait_are_explained() -> None:
    assert explained("PartitionNodeLimit").startswith("PartitionNodeLimit: the partition never gives so many nodes")
    assert "down or drained" in explained("ReqNodeNotAvail,_UnavailableNodes:node2")
    assert explained("QOSMaxNodePerUserLimit") != explained("QOSGrpNodeLimit")
    assert explained("SomethingNew") == "SomethingNew"
