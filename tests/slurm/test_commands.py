"""Slurm's commands where its controller does not answer: shell scripts in their place."""

from pathlib import Path

import pytest

from bifrost.slurm import SlurmError, commands
from clusterruns import Stand, failing

BUSY = "slurm_load_jobs error: Socket timed out on send/recv operation"


def test_a_controller_that_answers_late_is_asked_again(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    shown = "JobId=7 JobState=RUNNING Reason=None RunTime=00:01 EndTime=2026-01-01T00:00:10 ExcNodeList=n[1-2]"
    calls = stand("scontrol", failing(BUSY), failing("Unable to contact slurm controller"), f"echo {shown}")
    state = commands.job_state("7")
    assert state and (state.state, state.excluded, state.nodes) == ("RUNNING", "n[1-2]", "")
    assert state.ends_at and round(state.ends_at) % 60 == 10
    assert len(calls()) == 3
    assert capsys.readouterr().err.count("Socket timed out") == 1, "said once"


def test_one_that_never_answers(stand: Stand) -> None:
    calls = stand("scontrol", failing(BUSY))
    with pytest.raises(SlurmError, match="Socket timed out"):
        commands.requeue("7")
    assert len(calls()) == 4


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
