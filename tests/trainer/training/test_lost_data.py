"""A loader's worker that is killed, by lack of memory say, ends the run with a code that has it started again."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

import runs
from bifrost.slurm.exit_codes import LOST


@pytest.mark.multi
def test_a_killed_worker(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "tiny-mllm"
    (run / "slurm").mkdir(parents=True)
    monkeypatch.setenv("BIFROST_RUN", str(run))
    arguments = runs.arguments(shards, tmp_path, "steps=4000", "data.workers=1", "--ranks", "2")
    with runs.launched(arguments, stderr=subprocess.PIPE, text=True) as launcher:
        runs.wait_for_steps(run, 2)
        second = runs.children(launcher.pid)[1]
        os.kill(runs.children(second)[0], signal.SIGKILL)
        _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == LOST, err
    assert err.count("error: ") == 1 and "error: rank 1: DataLoader worker" in err
    assert f'"rank": "1", "code": {LOST}' in (run / "slurm" / "exit_record.json").read_text()
