"""Ranks from Slurm's variables."""

from pathlib import Path

import pytest

from bifrost.slurm import rank_environment
from bifrost.slurm.ranks import expand_hosts, first_host, private_folders, remove_private_folders

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "123456",
}


def test_a_task_of_a_step() -> None:
    assert rank_environment(STEP) == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + 123456 % 20_000),
    }


def test_what_the_user_set_stays() -> None:
    assert (rank_environment({**STEP, "MASTER_ADDR": "10.0.0.1"}) or {})["MASTER_ADDR"] == "10.0.0.1"


def test_a_batch_script_is_no_rank() -> None:
    """Its shell has SLURM_PROCID too: only srun's tasks have a step."""
    assert rank_environment({k: v for k, v in STEP.items() if not k.startswith("SLURM_STEP")}) is None
    assert rank_environment({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-012,020],login1", "gpu007"),
        ("r[1-2]c[03,07]n", "r1c03n"),
        ("a-b[5]", "a-b5"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_all_hosts() -> None:
    assert expand_hosts("gpu[007-008,020],login1") == ["gpu007", "gpu008", "gpu020", "login1"]
    assert expand_hosts("r[1-2]c[09-10]n") == ["r1c09n", "r1c10n", "r2c09n", "r2c10n"]
    assert expand_hosts("n[99-101]") == ["n99", "n100", "n101"]


def test_private_folders_go_with_the_run(tmp_path: Path) -> None:
    """The task's own folder goes; a TMPDIR that is somebody else's stays."""
    task = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_LOCALID": "3", "BIFROST_SCRATCH": str(tmp_path)}
    own = {**task, **private_folders(task)}
    assert private_folders(task)["TMPDIR"] == own["TMPDIR"] != private_folders({**task, "SLURM_LOCALID": "2"})["TMPDIR"]
    remove_private_folders({**task, "TMPDIR": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 2
    remove_private_folders(own)
    assert [folder.name for folder in tmp_path.iterdir()] == ["bifrost-7-n1-2"]
