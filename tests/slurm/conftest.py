"""A real two-node Slurm cluster per test process, and stand-ins for Slurm's commands."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bifrost.slurm import commands, devcluster
from clusterruns import ClusterRun, Stand


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Folder of a running cluster; SLURM_CONF points to it until the end of the session."""
    if missing := devcluster.missing_programs():
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    # Slurm's sockets need short paths.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name) / "cluster"
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(devcluster.up(folder, 2))
        yield folder
        devcluster.down(folder)
        os.environ.pop("SLURM_CONF")
        if before:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def run(cluster: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterRun]:
    """A run to submit, on a site without preflight; its jobs are cancelled afterwards."""
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump({"preflight": False}))
    monkeypatch.setenv("BIFROST_SITE", str(file))
    run = ClusterRun(cluster, shards, tmp_path)
    yield run
    run.clear()
    print(*run.attempts(), run.log(), sep="\n")  # shown where a test fails


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """stand("scontrol", script of the first call, …) puts a program into PATH; the last script serves all further
    calls. Returns a function that lists the arguments, one line per call."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "PATIENCE_S", 0.02)

    def put(name: str, *scripts: str) -> Callable[[], list[str]]:
        calls = tmp_path / f"{name}.calls"
        cases = "\n".join(f"{number}) {script};;" for number, script in enumerate(scripts, 1))
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\necho "$*" >> {calls}\nn=$(wc -l < {calls})\n'
            f"case $((n < {len(scripts)} ? n : {len(scripts)})) in\n{cases}\nesac\n"
        )
        program.chmod(0o755)
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return put
