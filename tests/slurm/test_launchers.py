"""Two nodes with two ranks each on the cluster: the GPU of each rank, and other launchers in a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs

pytestmark = pytest.mark.multi

BIFROST = str(Path(sys.executable).with_name("bifrost"))
DEVICES = """
import os
import torch
from bifrost.slurm.preflight import find_rank_info
from bifrost.slurm.preflight.fabric import Wire
from bifrost.trainer.distributed.launcher import init_from_env
from bifrost.trainer.distributed.process_group import _device
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
torch.cuda.set_device = lambda device: None
me = find_rank_info()
assert init_from_env()
rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
print(rank, os.environ["WORLD_SIZE"], me.node, Wire(me.local).device, _device(rank, local))
"""


def srun(cluster: Path, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a job step on `cluster`."""

    environment = {**os.environ, **variables}
    ended = subprocess.run(
        ["srun", *command], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert not check or ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def test_every_rank_uses_the_gpu_of_its_local_rank(cluster: Path, tmp_path: Path) -> None:
    """In preflight and training, with torch reporting two GPUs per node; also with leftover launcher variables."""
    for left in ({}, {"LOCAL_RANK": "0", "RANK": "0"}):
        ended = srun(cluster, "-N2", "--ntasks-per-node=2", sys.executable, "-c", DEVICES, TMPDIR=str(tmp_path), **left)
        assert sorted(ended.stdout.splitlines()) == [
            f"{rank} 4 node{rank // 2 + 1} cuda:{rank % 2} cuda:{rank % 2}" for rank in range(4)
        ]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "--ranks"])
def test_a_task_that_starts_the_ranks_of_its_node(cluster: Path, shards: Path, tmp_path: Path, launcher: str) -> None:
    """With loader workers, and a temporary folder with a path as long as Slurm's own per job."""
    command = [BIFROST, *runs.arguments(shards, tmp_path, "steps=1", "data.workers=1")]
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    if launcher == "torchrun":
        started = [str(Path(BIFROST).with_name("torchrun")), "--nproc-per-node", "2", "--no-python", *command]
    else:
        started = ["bash", "-c", f"{' '.join(command)} --ranks 2"]
    srun(cluster, "-N1", "-n1", *started, TMPDIR=str(folder))
    (start,) = runs.events(tmp_path / "tiny-mllm", "start")
    assert start["ranks"] == 2 and len(runs.losses(tmp_path / "tiny-mllm")) == 1


def test_variables_that_contradict_the_step_are_refused(cluster: Path, shards: Path, tmp_path: Path) -> None:
    left = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    ended = srun(cluster, "-n2", BIFROST, *runs.arguments(shards, tmp_path), check=False, **left)
    assert ended.returncode == 2 and "but Slurm runs this as task" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "tiny-mllm").exists()
