"""Exit records of ranks, which the batch script reads."""

import errno
import os
from pathlib import Path

import pytest

from bifrost.data import DataLost, retry
from bifrost.slurm.exit_record import newest_step, read_outcome, record_outcome


def test_the_first_rank_to_record_its_exit_reason_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("BIFROST_RUN", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "3")
    record_outcome(76, "node2 waits", host="node2")
    record_outcome(1, "a later one")
    outcome = {"attempt": "7.0", "rank": "3", "code": 76, "reason": "node2 waits", "host": "node2"}
    assert read_outcome(tmp_path) == outcome
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert read_outcome(tmp_path) is None, "recorded in an earlier attempt"


def test_an_unreadable_run_folder_has_not_lost_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000004", "step-00000012", "step-00000020.partial", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    failures = [OSError(errno.ESTALE, "Stale file handle")]

    def list_folder(folder: Path) -> list[str]:
        if failures:
            raise failures.pop()
        return real(folder)

    real = os.listdir
    monkeypatch.setattr(os, "listdir", list_folder)
    monkeypatch.setattr(retry, "_sleep", lambda seconds: None)
    assert newest_step(tmp_path) == 12 and failures == []
    failures += [OSError(errno.ESTALE, "Stale file handle")] * 1000
    with pytest.raises(DataLost, match="Stale file handle"):
        newest_step(tmp_path)
