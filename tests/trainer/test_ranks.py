"""Who meets whom when the ranks of a Slurm job start."""

import os
import socket
import subprocess
import sys

import pytest

MEET = """
from datetime import timedelta
import torch.distributed
from bifrost.trainer.ranks import join
print(join(timedelta(seconds=20)).gather("here"))
torch.distributed.destroy_process_group()
"""


def meet(*restarts: str) -> list[subprocess.CompletedProcess[str]]:
    """Ranks that each take themselves for one of that start of the same job, on the same port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(len(restarts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET],
            env={**common, **job, "RANK": str(rank), "LOCAL_RANK": str(rank), "SLURM_RESTART_COUNT": restart},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, restart in enumerate(restarts)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    return [subprocess.CompletedProcess([], r.returncode, *o) for r, o in zip(ranks, outputs, strict=True)]


@pytest.mark.multi
def test_ranks_of_one_start_meet() -> None:
    for rank in meet("1", "1"):
        assert rank.returncode == 0 and "['here', 'here']" in rank.stdout, rank.stderr


@pytest.mark.multi
def test_a_rank_of_an_earlier_start_is_none_of_ours() -> None:
    for rank in meet("1", "0"):
        assert rank.returncode != 0 and "here" not in rank.stdout
        assert "Timeout" in rank.stderr or "timeout" in rank.stderr or "Connection" in rank.stderr, rank.stderr
