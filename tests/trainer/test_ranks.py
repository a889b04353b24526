"""Who meets whom when ranks start, and who is named that does not come."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.slurm.codes import HUNG
from bifrost.trainer.meeting import absence

MEET = """
import os, time
from datetime import timedelta
import torch
from bifrost.trainer.ranks import join
if os.environ["DEVICE"] == "blocked":
    torch.cuda.is_available = lambda: time.sleep(600)
print(join(timedelta(seconds=60), wait_s=float(os.environ["WAIT"])).gather("here"))
torch.distributed.destroy_process_group()
"""


def meet(
    *restarts: str | None, wait_s: float = 10, blocked: int | None = None, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Ranks that each take themselves for one of that start of the same job, on the same port; None never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(len(restarts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "GLOO_SOCKET_IFNAME": "lo", "WAIT": str(wait_s), **variables}
    ranks = {
        rank: subprocess.Popen(
            [sys.executable, "-c", MEET],
            env={
                **common,
                **job,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "SLURM_RESTART_COUNT": restart,
                "SLURMD_NODENAME": f"node{rank}",
                "DEVICE": "blocked" if rank == blocked else "well",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, restart in enumerate(restarts)
        if restart is not None
    }
    try:
        outputs = {rank: process.communicate(timeout=240) for rank, process in ranks.items() if rank != blocked}
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()
    return [subprocess.CompletedProcess([], ranks[rank].returncode, *output) for rank, output in outputs.items()]


@pytest.mark.multi
def test_ranks_of_one_start_meet() -> None:
    for rank in meet("1", "1"):
        assert rank.returncode == 0 and "['here', 'here']" in rank.stdout, rank.stderr


@pytest.mark.multi
def test_a_rank_of_an_earlier_start_is_none_of_ours() -> None:
    first, second = meet("1", "0", wait_s=5)
    assert "here" not in first.stdout and "Unmet: rank 1 of 2 did not come within 5 s" in first.stderr, first.stderr
    assert "here" not in second.stdout and "Unmet: rank 1: rank 0 has not come" in second.stderr, second.stderr


@pytest.mark.multi
def test_a_rank_that_never_comes_is_named_with_its_node() -> None:
    for rank in meet("1", "1", None, SLURM_STEP_NODELIST="node[0-2]"):
        assert rank.returncode and "Unmet: rank 2 of 3 did not come within 10 s, on node2\n" in rank.stderr, rank.stderr


@pytest.mark.multi
def test_nobody_opens_the_meeting() -> None:
    (second,) = meet(None, "1", wait_s=5)
    assert second.returncode and "Unmet: rank 1: rank 0 cannot be reached at 127.0.0.1:" in second.stderr


@pytest.mark.multi
def test_a_rank_whose_device_never_answers_is_named() -> None:
    (first,) = meet("1", "1", blocked=1)
    assert "Unmet: rank 1 of 2 came, but no device answered there within 10 s, on node1\n" in first.stderr, first.stderr


def train_without(missing: str, arguments: list[str]) -> None:
    """The `bifrost` command on all ranks but one, which never comes."""
    if os.environ["RANK"] != missing:
        ranked.command(arguments)


@pytest.mark.multi
def test_a_start_without_one_of_its_ranks_ends_as_a_hang(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "watchdog.start_s=60")
    ended = ranked.run(train_without, 3, "2", arguments)
    assert [rank.code for rank in ended] == [HUNG, HUNG, 0]
    assert ended[0].err.count("error: rank 2 of 3 did not come within 12 s\n") == 1, ended[0].err
    assert "error" not in ended[1].err and not (tmp_path / "tiny-mllm").exists()


def test_who_is_missing() -> None:
    nodes = ["a", "b", "c", "d"]
    hosts = {rank: nodes[rank // 4] for rank in range(16)}

    def said(*missing: int, step: list[str] = nodes) -> tuple[str, str | None]:
        came = {rank: host for rank, host in hosts.items() if rank not in missing}
        return absence(16, 300, came, set(came), step)

    assert said(5) == ("rank 5 of 16 did not come within 300 s, on b", "b")
    assert said(8, 9, 10, 11) == ("ranks 8, 9, 10, 11 of 16 did not come within 300 s, on c", "c")
    assert said(3, 15) == ("ranks 3, 15 of 16 did not come within 300 s, on a, d", None)
    assert said(5, step=[]) == ("rank 5 of 16 did not come within 300 s", None)
    many, host = said(*range(4, 16))
    assert "ranks 4, 5, 6, 7, 8, 9, 10, 11 and 4 more of 16" in many and many.endswith("on b, c, d") and host is None
    line, host = absence(16, 300, hosts, set(hosts) - {13}, nodes)
    assert line == "rank 13 of 16 came, but no device answered there within 300 s, on d" and host == "d"
