"""Node and rank of this process, and the nodes that take part."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..rank_env import expand_hosts, host_name, rank_environment

SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process and its job step."""

    node: str
    rank: int
    size: int
    local: int
    """Local rank, and index of its GPU."""
    nodes: tuple[str, ...]
    """All nodes of the step, in Slurm's order."""
    host: str
    port: int
    """Rendezvous address, on the node of rank 0."""
    name: str
    """Name of this attempt: job, restart, step."""
    in_job: bool
    """Whether a restart can exclude a node."""
    devices: int | None
    """GPUs per node that the job requested; None if unknown."""
    bound: bool
    """The job binds GPUs to tasks, so that a task does not see all GPUs of its node."""

    @property
    def leader(self) -> bool:
        """Whether this rank runs the checks of its node."""
        return self.local == 0


def find_rank_info(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """Rank information of an srun task, or of a single process."""
    environ = {**environ, **(rank_environment(environ) or SINGLE_PROCESS)}
    node = host_name(environ)
    size = int(environ["WORLD_SIZE"])
    nodes = environ.get("SLURM_STEP_NODELIST") if size > 1 else None
    asked = environ.get("SLURM_GPUS_ON_NODE")
    job = environ.get("SLURM_JOB_ID")
    start = f"{environ.get('SLURM_RESTART_COUNT', '0')}-{environ.get('SLURM_STEP_ID', '0')}"
    return RankInfo(
        node=node,
        rank=int(environ["RANK"]),
        size=size,
        local=int(environ["LOCAL_RANK"]),
        nodes=tuple(expand_hosts(nodes)) if nodes else (node,),
        host=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environ.get("MASTER_PORT", 0)),
        name=f"{job}-{start}" if job else f"alone-{node}-{int(time.time())}",
        in_job=job is not None,
        devices=int(asked) if asked and asked.isdigit() else None,
        bound=_bound(environ),
    )


def _bound(environ: Mapping[str, str]) -> bool:
    """Whether --gpus-per-task, --ntasks-per-gpu, --tres-per-task or --gpu-bind was given."""
    per_task = environ.get("SLURM_GPUS_PER_TASK") or environ.get("SLURM_NTASKS_PER_GPU")
    bind = environ.get("SLURM_GPU_BIND", "none")
    return bool(per_task) or "gpu" in environ.get("SLURM_TRES_PER_TASK", "") or bind not in ("", "none")
