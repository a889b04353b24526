"""Which node and rank this process is, and who else is expected."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..ranks import expand_hosts, rank_environment


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    node: str
    rank: int
    size: int
    leader: bool
    """Makes the checks of its node."""
    nodes: tuple[str, ...]
    """All nodes of the step, in Slurm's order."""
    host: str
    port: int
    """Rendezvous: the node of rank 0."""
    name: str
    """Of this start: job, restart, step."""
    in_job: bool
    """A node can be left out by starting again."""
    devices: int | None
    """GPUs a node that the job asked for, where Slurm tells."""


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of an srun task, or that of a process that is alone."""
    environ = {**(rank_environment(environ) or {}), **environ}
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    size = int(environ.get("WORLD_SIZE", 1))
    nodes = environ.get("SLURM_STEP_NODELIST") if size > 1 else None
    asked = environ.get("SLURM_GPUS_ON_NODE")
    job = environ.get("SLURM_JOB_ID")
    start = f"{environ.get('SLURM_RESTART_COUNT', '0')}-{environ.get('SLURM_STEP_ID', '0')}"
    return Place(
        node=node,
        rank=int(environ.get("RANK", 0)),
        size=size,
        leader=environ.get("LOCAL_RANK", "0") == "0",
        nodes=tuple(expand_hosts(nodes)) if nodes else (node,),
        host=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=int(environ.get("MASTER_PORT", 0)),
        name=f"{job}-{start}" if job else f"alone-{node}-{int(time.time())}",
        in_job=job is not None,
        devices=int(asked) if asked and asked.isdigit() else None,
    )
