"""The local cluster runs jobs on all nodes, two clusters do not interfere, and `down` leaves no process."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bifrost.slurm import SlurmError, devcluster
from bifrost.slurm.cli import slurm_app


def slurm(conf: Path, *command: str) -> str:
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_up_and_down_next_to_another_cluster(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = cluster.parent / "second"
    printed = CliRunner().invoke(slurm_app, ["devcluster", "up", "--folder", str(folder), "--nodes", "3"])
    assert printed.output == f"export SLURM_CONF={folder}/slurm.conf\n"
    where = "echo $SLURMD_NODENAME $MASTER_ADDR; sleep 0.1"
    hosts = slurm(folder / "slurm.conf", "srun", "-N3", "--ntasks-per-node=2", "sh", "-c", where)
    assert sorted(hosts.splitlines()) == [f"node{n} 127.0.0.1" for n in (1, 1, 2, 2, 3, 3)]
    assert len(slurm(cluster / "slurm.conf", "sinfo", "-h", "-N").splitlines()) == 2

    with pytest.raises(SlurmError, match="already runs in"):
        devcluster.up(folder, 2)
    # `down` also ends the slurmstepd and the tasks of a killed slurmd.
    job = slurm(folder / "slurm.conf", "sbatch", "--parsable", "-N2", "--wrap", "srun sleep 300", "--output=/dev/null")
    while slurm(folder / "slurm.conf", "squeue", "-h", "-j", job.strip(), "-o", "%T").strip() != "RUNNING":
        time.sleep(0.1)
    time.sleep(1)
    running = devcluster.processes(folder)
    assert sum(process.name() == "sleep" for process in running) == 2
    devcluster.kill(p for p in devcluster.processes(folder, "node1") if p.name() == "slurmd")
    ended = CliRunner().invoke(slurm_app, ["devcluster", "down", "--folder", str(folder)])
    assert ended.exit_code == 0 and "processes ended" in ended.output
    assert not [process for process in running if process.is_running()]
    assert devcluster.processes(cluster), "the other cluster keeps running"


@pytest.mark.parametrize("found", ["notes.txt", "slurm.conf"])
def test_a_foreign_folder_is_left_unchanged(tmp_path: Path, found: str) -> None:
    """Also one with a site's slurm.conf; `down` does not end daemons that log there."""
    (tmp_path / found).write_text("ClusterName=site\n")
    with pytest.raises(SlurmError, match="holds something else; choose a new or empty folder"):
        devcluster.up(tmp_path, 2)
    with pytest.raises(SlurmError, match="holds no cluster"):
        devcluster.down(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [found]
    with pytest.raises(SlurmError, match="holds something else"):
        devcluster.up(tmp_path / found, 2)


def test_foreign_files_in_a_cluster_folder_are_kept(tmp_path: Path) -> None:
    for name in ("state/jobs", "spool.node1/cred", "node1.log", "mine.txt", "runs/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "slurm.conf").write_text("ClusterName=bifrost\n")
    assert devcluster._made_here(tmp_path)
    devcluster._clear(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt", "runs"}


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devcluster, "PROGRAMS", ("no-such-munged", "sh"))
    with pytest.raises(SlurmError, match=r"^no-such-munged not found: .*apt-get install slurm-wlm munge$"):
        devcluster.up(tmp_path, 2)
