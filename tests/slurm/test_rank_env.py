"""Ranks from the variables of Slurm and other launchers."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bifrost.slurm import SlurmError, launched_by, rank_environment
from bifrost.slurm.rank_env import (
    expand_hosts,
    free_port,
    idle_nodes,
    private_folders,
    remove_private_folders,
)

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


ONE = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
"""A step of one task."""
FULL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_an_address_set_by_the_user_is_kept() -> None:
    assert (rank_environment({**STEP, "MASTER_ADDR": "10.0.0.1"}) or {})["MASTER_ADDR"] == "10.0.0.1"


def test_concurrent_steps_of_a_job_use_different_ports() -> None:
    ports = {(rank_environment({**STEP, "SLURM_STEP_ID": str(step)}) or {})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20 and all(10_000 <= int(port) < 30_000 for port in ports)


def test_a_batch_script_is_not_a_rank() -> None:
    """Its shell has SLURM_PROCID too, but only srun tasks have a step."""
    assert rank_environment({k: v for k, v in STEP.items() if not k.startswith("SLURM_STEP")}) is None
    assert rank_environment({}) is None


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size", "local"),
    [
        (FULL, "environment", 1, 2, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "environment", 0, 1, 0),
        ({**FULL, "BIFROST_LAUNCHER": "7"}, "bifrost", 1, 2, 1),
        # Started by a single task.
        ({**ONE, **FULL}, "environment", 1, 2, 1),
        ({**ONE, **FULL, "TORCHELASTIC_RUN_ID": "none"}, "torchrun", 1, 2, 1),
        ({**ONE, **FULL, "BIFROST_LAUNCHER": "7"}, "bifrost", 1, 2, 1),
        ({**STEP, **FULL, "TORCHELASTIC_RUN_ID": "none", "RANK": "19", "WORLD_SIZE": "24"}, "torchrun", 19, 24, 1),
        # Task 9 of 12 starts ranks 18 and 19 of 24, as a launcher per task does.
        ({**STEP, **FULL, "RANK": "19", "WORLD_SIZE": "24"}, "environment", 19, 24, 1),
        # Leftovers: Slurm's values win.
        ({**STEP, "RANK": "0"}, "slurm", 9, 12, 1),
        ({**STEP, "WORLD_SIZE": "1"}, "slurm", 9, 12, 1),
        ({**STEP, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "slurm", 9, 12, 1),
        ({**STEP, **FULL, "WORLD_SIZE": "12"}, "slurm", 9, 12, 1),
        ({**STEP, "RANK": "", "WORLD_SIZE": ""}, "slurm", 9, 12, 1),
        # A submitted job fixes the number of ranks.
        ({**ONE, "BIFROST_RUN": "/runs/a"}, "slurm", 0, 1, 0),
    ],
)
def test_launcher_of_a_rank(environ: dict, launcher: str, rank: int, size: int, local: int) -> None:
    found = rank_environment(environ)
    assert found and (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (str(rank), str(size), str(local))
    assert launched_by(environ) == launcher
    assert rank_environment({**environ, **found}) == found, "idempotent"


@pytest.mark.parametrize(
    "environ",
    [ONE, {"LOCAL_RANK": "3"}, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}, {"RANK": "", "WORLD_SIZE": ""}],
)
def test_environments_that_are_not_of_a_rank(environ: dict) -> None:
    """A step of one task may start a rank per GPU."""
    assert rank_environment(environ) is None


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"RANK": "0"}, "RANK is set without WORLD_SIZE: unset RANK,"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "WORLD_SIZE is set without RANK: unset WORLD_SIZE MASTER_PORT,"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set without LOCAL_RANK, MASTER_ADDR, MASTER_P"),
        ({**FULL, "LOCAL_RANK": ""}, "set without LOCAL_RANK: unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR"),
        ({**FULL, "RANK": "2"}, "RANK=2 with WORLD_SIZE=2: want a rank of 0 to"),
        ({**FULL, "RANK": "-1"}, "RANK=-1 with WORLD_SIZE=2"),
        ({**FULL, "RANK": "one"}, "RANK=one: want a number"),
        ({**FULL, "WORLD_SIZE": "2.0"}, r"WORLD_SIZE=2\.0: want a number"),
        ({**FULL, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 with WORLD_SIZE=2"),
        ({**FULL, "MASTER_PORT": "http"}, "MASTER_PORT=http: want a number"),
        ({**FULL, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: want a port"),
        ({**STEP, **FULL}, "RANK=1 and WORLD_SIZE=2 are set, but Slurm runs this as task 9 of 12: .* unset RANK WORLD"),
        ({**STEP, **FULL, "RANK": "0", "WORLD_SIZE": "24"}, "RANK=0 and WORLD_SIZE=24 are set, but Slurm"),
        ({**STEP, "SLURM_PTY_PORT": "4000"}, "this shell is task 9 of 12 of an interactive step"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(environ: dict, problem: str) -> None:
    with pytest.raises(SlurmError, match=problem) as refused:
        rank_environment(environ)
    assert "\n" not in str(refused.value)


def test_a_port_in_use_is_not_chosen() -> None:
    first = free_port(7)
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        assert free_port(7) != first
    assert free_port(7) == first and 10_000 <= first < 30_000


def test_nodes_left_idle_without_srun() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_PROCID": "0"}
    assert idle_nodes(job) == 3 and idle_nodes({}) == 0
    assert idle_nodes({**job, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}) == 3, "salloc's own shell"
    assert idle_nodes({**job, **ONE}) == 0, "a requested single task"


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
def test_the_first_of_the_hosts(nodes: str, first: str) -> None:
    assert expand_hosts(nodes)[0] == first


def test_all_hosts() -> None:
    assert expand_hosts("gpu[007-008,020],login1") == ["gpu007", "gpu008", "gpu020", "login1"]
    assert expand_hosts("r[1-2]c[09-10]n") == ["r1c09n", "r1c10n", "r2c09n", "r2c10n"]
    assert expand_hosts("n[99-101]") == ["n99", "n100", "n101"]


def test_private_folders_are_removed_with_the_run(tmp_path: Path) -> None:
    """Only the task's own folder is removed, not another TMPDIR."""
    task = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_LOCALID": "3", "BIFROST_SCRATCH": str(tmp_path)}
    own = {**task, **private_folders(task)}
    assert private_folders(task)["TMPDIR"] == own["TMPDIR"] != private_folders({**task, "SLURM_LOCALID": "2"})["TMPDIR"]
    remove_private_folders({**task, "TMPDIR": str(tmp_path)})
    assert len(list(tmp_path.iterdir())) == 2
    remove_private_folders(own)
    assert [folder.name for folder in tmp_path.iterdir()] == ["bifrost-7-n1-2"]


TASK = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1", "SLURM_LOCALID": "0"}
NAME = "bifrost-7-node1-0"


def test_private_folders_are_accessible_to_their_user_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        own = private_folders({**TASK, "TMPDIR": str(tmp_path)})
    finally:
        os.umask(before)
    assert own["TMPDIR"] == f"{tmp_path}/{NAME}" and own["TRITON_CACHE_DIR"] == f"{tmp_path}/{NAME}/triton"
    assert [Path(folder).stat().st_mode & 0o777 for folder in own.values()] == [0o700, 0o700]


def _link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(0o700)
    folder.symlink_to(elsewhere)


def _writable(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)


@pytest.mark.parametrize(
    ("put", "what"),
    [
        (_link, "is a symbolic link"),
        (lambda folder: folder.symlink_to("nowhere"), "is a symbolic link"),
        (Path.touch, "is not a folder"),
        (lambda folder: _writable(folder, 0o775), r"can be written by others \(drwxrwxr-x\)"),
        (lambda folder: _writable(folder, 0o1777), "can be written by others"),
    ],
)
@pytest.mark.parametrize("inner", [False, True], ids=["temporary", "triton"])
def test_a_folder_that_another_user_may_have_created_is_refused(
    tmp_path: Path, put: Callable[[Path], None], what: str, inner: bool
) -> None:
    folder = tmp_path / NAME
    if inner:
        folder.mkdir(0o700)
    put(folder / "triton" if inner else folder)
    with pytest.raises(SlurmError, match=f"{what}.*BIFROST_SCRATCH"):
        private_folders({**TASK, "TMPDIR": str(tmp_path)})
    assert not (tmp_path / "elsewhere" / "triton").exists()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir(0o700)
    owner = (tmp_path / NAME).stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(SlurmError, match=f"{NAME} belongs to user {owner}"):
        private_folders({**TASK, "TMPDIR": str(tmp_path)})


def test_an_unwritable_temporary_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SlurmError, match="set BIFROST_SCRATCH"):
        private_folders({**TASK, "BIFROST_SCRATCH": str(tmp_path / "file" / "scratch")})


def test_the_target_of_a_link_is_not_removed(tmp_path: Path) -> None:
    _link(tmp_path / NAME)
    (tmp_path / "elsewhere" / "kept").touch()
    remove_private_folders({**TASK, "TMPDIR": str(tmp_path / NAME)})
    assert (tmp_path / "elsewhere" / "kept").exists()
