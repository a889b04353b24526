"""Exit records of ranks, which the batch script reads."""

from pathlib import Path

import pytest

from bifrost.slurm.exit_record import read_outcome, record_outcome


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
