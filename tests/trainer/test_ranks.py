"""Who meets whom when ranks start, and who is named that does not come."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ranked
import runs
from bifrost.slurm.codes import HUNG
from bifrost.trainer import meeting, ranks
from bifrost.trainer.cli import app
from bifrost.trainer.errors import RunError
from bifrost.trainer.launch import adopt_rank
from bifrost.trainer.meeting import absence

MEET = """
import os, time
from datetime import timedelta
import torch
from bifrost.trainer.ranks import join
if os.environ["DEVICE"] == "blocked":
    torch.cuda.is_available = lambda: time.sleep(600)
if os.environ["DEVICE"] == "bound":
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: print("set", device)
print(join(timedelta(seconds=60), wait_s=float(os.environ["WAIT"])).gather("here"))
torch.distributed.destroy_process_group()
"""


def meet(
    *restarts: str | None, wait_s: float = 10, blocked: int | None = None, bound: bool = False, **variables: str
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
                "DEVICE": "blocked" if rank == blocked else "bound" if bound else "well",
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


@pytest.mark.multi
def test_gpus_bound_to_tasks_are_refused_on_every_rank() -> None:
    for rank in meet("1", "1", bound=True):
        expected = "RunError: rank 1 on node1 is number 1 there and sees 1 GPU: each task must see all GPUs of its node"
        assert rank.returncode and expected in rank.stderr, rank.stderr
        assert "here" not in rank.stdout


def test_a_rank_uses_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: asked.append(str(device)))
    assert [str(ranks._device(rank, rank % 2)) for rank in range(4)] == asked == ["cuda:0", "cuda:1"] * 2


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 are set without LOCAL_RANK"),
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"},
            "this Slurm job has 2 nodes, and bifrost was started",
        ),
    ],
)
def test_a_start_that_its_environment_spoils(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], problem: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=problem):
        CliRunner().invoke(app, runs.arguments(tmp_path, tmp_path), catch_exceptions=False)


def test_what_an_earlier_launcher_left_does_not_reach_ranks_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "gone"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert adopt_rank(1) is False
    assert not left.keys() & os.environ.keys()


def test_a_torchrun_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = str(taken.getsockname()[1])
        left = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(meeting, "AGENT_S", 0.1)
        with pytest.raises(RunError, match=f"nothing answers at 127.0.0.1:{port}.*unset TORCHELASTIC_RUN_ID RANK"):
            meeting.require_agent(0)
        taken.listen()
        meeting.require_agent(0)


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
