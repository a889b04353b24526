"""Excluded nodes: per run, and per site if found bad repeatedly."""

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bifrost.slurm.errors import SlurmError
from bifrost.slurm.exclusions import exclude, excluded


@dataclass
class Site:
    bad_node_file: str | None = None
    bad_node_threshold: int = 3


def test_a_run_excludes_a_node_it_found_bad_once(tmp_path: Path) -> None:
    assert excluded(tmp_path, Site()) == excluded(tmp_path, None) == []
    exclude({"node2": "ECC", "node10": "absent"}, tmp_path, Site())
    exclude({"node2": "slow"}, tmp_path, None)
    assert excluded(tmp_path, Site()) == ["node10", "node2"]
    entry = json.loads((tmp_path / "excluded.json").read_text())["node2"]
    assert entry["times"] == 2 and entry["reason"] == "slow" and entry["last"] > 1_600_000_000


def test_nodes_found_bad_repeatedly_are_excluded_from_every_run(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b", "c", "new")]
    for run in runs:
        run.mkdir()
    site = Site(str(tmp_path / "bad_nodes.json"))
    for found, run in enumerate(runs[:3]):
        assert excluded(runs[3], site) == [], f"excluded after {found} runs"
        exclude({"node2": "ECC"}, run, site)
    assert excluded(runs[3], site) == ["node2"]
    assert excluded(runs[3], Site(site.bad_node_file, 4)) == []
    assert excluded(runs[3], None) == []


WRITER = """
import sys
from types import SimpleNamespace
from bifrost.slurm.errors import SlurmError
from bifrost.slurm.exclusions import exclude
for number in range(20):
    bad = {"node1": "x", f"node{sys.argv[2]}-{number}": "y"}
    exclude(bad, None, SimpleNamespace(bad_node_file=sys.argv[1], bad_node_threshold=3))
"""


def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    file = tmp_path / "bad_nodes.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(n)]) for n in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    book = json.loads(file.read_text())
    assert book["node1"]["times"] == 60 and len(book) == 61


@pytest.mark.parametrize("text", ["{", "[1]", '{"node1": 3}', '{"node1": {"last": 1}}'])
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / "excluded.json"
    file.write_text(text)
    for call in (lambda: excluded(tmp_path, None), lambda: exclude({"node1": "x"}, tmp_path, None)):
        with pytest.raises(SlurmError, match=r"excluded\.json"):
            call()
    assert file.read_text() == text


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(reason, "no locks")

    monkeypatch.setattr("fcntl.lockf", no_lock)
    exclude({"node1": "x"}, tmp_path, None)
    assert excluded(tmp_path, None) == ["node1"]


def test_a_lock_held_by_another_process_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object) -> None:
        raise OSError(errno.EAGAIN, "taken")

    monkeypatch.setattr("fcntl.lockf", taken)
    monkeypatch.setattr("bifrost.slurm.exclusions.LOCK_S", 0.1)
    with pytest.raises(TimeoutError, match="no lock within"):
        exclude({"node1": "x"}, tmp_path, None)
