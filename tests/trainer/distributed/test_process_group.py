"""The rendezvous of ranks, and the errors that name missing ones."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from typer.testing import CliRunner

import ranked
import runs
from bifrost.slurm.errors import first_line
from bifrost.slurm.exit_codes import FAILED, HUNG, INTERRUPTED, STOPPED
from bifrost.slurm.rank_env import free_port
from bifrost.trainer.cli import main
from bifrost.trainer.cli.main import app
from bifrost.trainer.distributed import process_group as ranks
from bifrost.trainer.distributed import rendezvous
from bifrost.trainer.distributed.interrupt import end_on_interrupt
from bifrost.trainer.distributed.launcher import init_from_env
from bifrost.trainer.distributed.rendezvous import describe_missing
from bifrost.trainer.distributed.stop_signals import StopSignals
from bifrost.trainer.errors import RendezvousTimeout, RunError, lost_rank
from bifrost.trainer.monitors.console import log_to_file

MEET = """
import os, time
from datetime import timedelta
import torch
from bifrost.trainer.distributed.process_group import join
if os.environ["DEVICE"] == "blocked":
    torch.cuda.is_available = lambda: time.sleep(600)
if os.environ["DEVICE"] == "bound":
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: print("set", device)
print(join(timedelta(seconds=60), wait_s=float(os.environ["WAIT"])).gather("here"))
torch.distributed.destroy_process_group()
"""


def join_ranks(
    *restarts: str | None, wait_s: float = 10, blocked: int | None = None, bound: bool = False, **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Ranks of one job on the same port, each with the given SLURM_RESTART_COUNT; the rank of a None never starts."""
    port = str(free_port())
    common = {**os.environ, "WORLD_SIZE": str(len(restarts)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
def test_ranks_of_one_attempt_join() -> None:
    for rank in join_ranks("1", "1"):
        assert rank.returncode == 0 and "['here', 'here']" in rank.stdout, rank.stderr


@pytest.mark.multi
def test_a_rank_of_an_earlier_attempt_is_ignored() -> None:
    first, second = join_ranks("1", "0", wait_s=5)
    assert "here" not in first.stdout and "RendezvousTimeout: rank 1 of 2 did not join within 5 s" in first.stderr, (
        first.stderr
    )
    assert "here" not in second.stdout and "RendezvousTimeout: rank 1: rank 0 did not join" in second.stderr, (
        second.stderr
    )


@pytest.mark.slow
@pytest.mark.multi
def test_a_missing_rank_is_named_with_its_node() -> None:
    for rank in join_ranks("1", "1", None, SLURM_STEP_NODELIST="node[0-2]"):
        assert (
            rank.returncode and "RendezvousTimeout: rank 2 of 3 did not join within 10 s, on node2\n" in rank.stderr
        ), rank.stderr


@pytest.mark.multi
def test_rank_0_opens_no_store() -> None:
    (second,) = join_ranks(None, "1", wait_s=5)
    assert second.returncode and "RendezvousTimeout: rank 1: rank 0 cannot be reached at 127.0.0.1:" in second.stderr


@pytest.mark.slow
@pytest.mark.multi
def test_a_rank_whose_device_hangs_is_named() -> None:
    (first,) = join_ranks("1", "1", blocked=1)
    assert (
        "RendezvousTimeout: rank 1 of 2 joined, but no device was ready there within 10 s, on node1\n" in first.stderr
    ), first.stderr


@pytest.mark.multi
def test_gpus_bound_to_tasks_are_refused_on_every_rank() -> None:
    for rank in join_ranks("1", "1", bound=True):
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
def test_contradicting_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], problem: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=problem):
        CliRunner().invoke(app, runs.arguments(tmp_path, tmp_path), catch_exceptions=False)


def test_ranks_option_ignores_variables_of_an_earlier_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "gone"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert init_from_env(1) is False
    assert not left.keys() & os.environ.keys()


def test_a_torchrun_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # without listening
        port = str(taken.getsockname()[1])
        left = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(rendezvous, "AGENT_S", 0.1)
        with pytest.raises(RunError, match=f"nothing answers at 127.0.0.1:{port}.*unset TORCHELASTIC_RUN_ID RANK"):
            rendezvous.require_agent(0)
        taken.listen()
        rendezvous.require_agent(0)


class SlowStore:
    """The store over a slow connection: reads take a while."""

    def __init__(self, store: HashStore, events: list[str]) -> None:
        self.store, self.events = store, events

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        time.sleep(0.2)
        self.events.append(key)
        return self.store.get(key)


@pytest.mark.parametrize(
    ("size", "problem", "error", "read"),
    [
        (3, "", "rank 2 of 3 did not join within 0 s", ["verdict"]),
        (2, "its GPU is gone", "its GPU is gone", ["verdict", "problem"]),
    ],
)
def test_rank_0_leaves_after_the_others_have_read_why(size: int, problem: str, error: str, read: list[str]) -> None:
    store, events, found = HashStore(), [], []
    for rank in (0, 1):
        store.set(f"joined-{rank}", "here")
    store.set("ready-1", "")

    def follow() -> None:
        with pytest.raises((RunError, RendezvousTimeout)) as raised:
            rendezvous.wait_for_all(SlowStore(store, events), 1, size, 5, problem)  # type: ignore[arg-type]
        found.append(str(raised.value))

    other = threading.Thread(target=follow)
    other.start()
    with pytest.raises((RunError, RendezvousTimeout), match=error):
        rendezvous.wait_for_all(store, 0, size, 0.1, problem)
    events.append("rank 0 left")
    other.join()
    assert found == [error] and events == [*read, "rank 0 left"]


def test_rank_0_does_not_wait_long_for_a_rank_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "READ_S", 0.1)
    store = HashStore()
    for key in ("joined-0", "joined-1", "ready-1"):
        store.set(key, "here")
    begun = time.monotonic()
    with pytest.raises(RendezvousTimeout, match="rank 2 of 3 did not join"):
        rendezvous.wait_for_all(store, 0, 3, 0.1)
    assert time.monotonic() - begun < 2


def test_ranks_that_cannot_connect_name_ports_and_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "12345")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(RendezvousTimeout, match=r"all 4 ranks joined, .* within 0 s: .* not only 12345, .* \(ib7\)"):
        rendezvous.connect(lambda: time.sleep(1), 4, 0.05, "gloo")
    rendezvous.connect(lambda: time.sleep(0.05), 4, 1, "gloo")


def train_without(missing: str, arguments: list[str]) -> None:
    """The `bifrost` command on all ranks but one, which never joins."""
    if os.environ["RANK"] != missing:
        ranked.command(arguments)


@pytest.mark.multi
def test_an_attempt_without_one_of_its_ranks_ends_as_a_hang(shards: Path, tmp_path: Path) -> None:
    arguments = runs.arguments(shards, tmp_path, "watchdog.startup_timeout_s=60")
    ended = ranked.run(train_without, 3, "2", arguments)
    assert [rank.code for rank in ended] == [HUNG, HUNG, 0]
    assert ended[0].err.count("error: rank 2 of 3 did not join within 12 s\n") == 1, ended[0].err
    assert "error" not in ended[1].err and not (tmp_path / "tiny-mllm").exists()


@pytest.mark.parametrize(("text", "line"), [("", "TimeoutError"), (" \n", "TimeoutError"), ("a\nb", "a")])
def test_an_error_without_a_message_is_named_by_its_type(text: str, line: str) -> None:
    assert first_line(TimeoutError(text)) == line


def test_missing_ranks_are_described() -> None:
    nodes = ["a", "b", "c", "d"]
    hosts = {rank: nodes[rank // 4] for rank in range(16)}

    def said(*missing: int, step: list[str] = nodes) -> tuple[str, str | None]:
        joined = {rank: host for rank, host in hosts.items() if rank not in missing}
        return describe_missing(16, 300, joined, set(joined), step)

    assert said(5) == ("rank 5 of 16 did not join within 300 s, on b", "b")
    assert said(8, 9, 10, 11) == ("ranks 8, 9, 10, 11 of 16 did not join within 300 s, on c", "c")
    assert said(3, 15) == ("ranks 3, 15 of 16 did not join within 300 s, on a, d", None)
    assert said(5, step=[]) == ("rank 5 of 16 did not join within 300 s", None)
    many, host = said(*range(4, 16))
    assert "ranks 4, 5, 6, 7, 8, 9, 10, 11 and 4 more of 16" in many and many.endswith("on b, c, d") and host is None
    line, host = describe_missing(16, 300, hosts, set(hosts) - {13}, nodes)
    assert line == "rank 13 of 16 joined, but no device was ready there within 300 s, on d" and host == "d"


def wait_alone(rank: str, route: str, trains: bool) -> None:
    """This rank waits for another one, which never comes, wherever `route` has it wait."""
    if os.environ["RANK"] != rank:
        return
    if route != "file":
        del os.environ["BIFROST_RENDEZVOUS"]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    if route == "torchrun":
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    StopSignals() if trains else end_on_interrupt()
    print("waits", flush=True)
    ranks.join(timedelta(seconds=60), wait_s=60)


NOTHING = "there was nothing to save"


@pytest.mark.multi
@pytest.mark.parametrize(
    ("rank", "route", "trains", "number", "code", "line"),
    [
        (0, "file", True, signal.SIGTERM, STOPPED, f"stopped by SIGTERM before training began; {NOTHING}, the same"),
        (1, "file", True, signal.SIGINT, INTERRUPTED, f"rank 1: interrupted before the first step; {NOTHING}"),
        (0, "tcp", True, signal.SIGINT, INTERRUPTED, f"interrupted before the first step; {NOTHING}"),
        (1, "tcp", True, signal.SIGTERM, STOPPED, f"rank 1: stopped by SIGTERM before training began; {NOTHING}"),
        (0, "torchrun", True, signal.SIGUSR1, STOPPED, f"stopped by SIGUSR1 before training began; {NOTHING}"),
        (1, "torchrun", True, signal.SIGTERM, STOPPED, f"rank 1: stopped by SIGTERM before training began; {NOTHING}"),
        (0, "tcp", False, signal.SIGINT, INTERRUPTED, "interrupted"),
        (1, "tcp", False, signal.SIGINT, INTERRUPTED, "interrupted"),
    ],
)
def test_a_rank_that_waits_for_others_answers_signals(
    tmp_path: Path, rank: int, route: str, trains: bool, number: signal.Signals, code: int, line: str
) -> None:
    processes = ranked.start(wait_alone, 2, str(rank), route, trains, folder=tmp_path)
    out = tmp_path / f"{rank}.out"
    while not (out.exists() and "waits" in out.read_text()):
        assert processes[rank].is_alive()
        time.sleep(0.02)
    time.sleep(0.3)
    begun = time.monotonic()
    os.kill(processes[rank].pid or 0, number)
    processes[rank].join(30)
    assert time.monotonic() - begun < 2
    ended = ranked.finish(processes, tmp_path)[rank]
    assert ended.code == code and ended.err.startswith(line) and ended.err.count("\n") == 1, ended.err


def lose_a_rank(folder: str) -> None:
    """`bifrost train`, as far as this is about: rank 1 is killed while the others sum."""

    def work(*_: object, **__: object) -> None:
        here = ranks.join(timedelta(seconds=60))
        if folder:
            log_to_file(Path(folder), here.rank)
        here.barrier()
        if here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        here.total([1.0])

    main.app, sys.argv = work, ["bifrost", "train"]
    main.main()


@pytest.mark.multi
@pytest.mark.parametrize("logged", [True, False])
def test_a_rank_that_lost_another_prints_one_line_and_logs_the_traceback(tmp_path: Path, logged: bool) -> None:
    first, second = ranked.run(lose_a_rank, 2, str(tmp_path) if logged else "")
    assert (first.code, second.code) == (FAILED, -signal.SIGKILL)
    assert first.err.startswith("error: rank 0: lost the connection to another rank (") and first.err.count("\n") == 1
    log = tmp_path / "rank-00000.log"
    if logged:
        assert f"traceback in {log}\n" in first.err
        assert "Traceback (most recent call last)" in log.read_text() and "in all_reduce" in log.read_text()
    else:
        assert "raised in " in first.err and "trainer/distributed/process_group.py:" in first.err


class DistBackendError(RuntimeError):
    """As torch.distributed's is called."""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:27. This is"),
            True,
        ),
        (RuntimeError("[x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation"), True),
        (RuntimeError("Gloo connectFullMesh failed with [x/gloo/transport/tcp/pair.cc:144] no error"), True),
        (DistBackendError("NCCL error in: x.cpp:94, remote process exited or there was a network error"), True),
        (DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (RuntimeError("wait timeout after 300000ms, keys: /met"), True),
        (DistBackendError("NCCL error in: x.cpp:94, invalid usage, ncclInvalidUsage: Duplicate GPU detected"), False),
        (DistBackendError("NCCL error: unhandled cuda error"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("Connection closed by peer"), False),
    ],
)
def test_only_a_lost_connection_passes_for_a_lost_rank(error: Exception, lost: bool) -> None:
    assert (lost_rank(error) is not None) == lost
    if lost:  # met while an error of this rank's own was being handled, which must not be hidden
        error.__context__ = KeyError("weight")
        assert lost_rank(error) is None


def test_on_a_gpu_nccl_is_bound_to_the_device_and_outwaits_the_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *backend, **settings: asked.update(settings))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "TORCH_FR_BUFFER_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    ranks.join(timedelta(seconds=1800.5))
    assert str(asked["device_id"]) == "cuda:0"
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "1801"
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60")
    ranks.join()
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "60", "the user's"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": ""}),
    ],
)
def test_a_rank_allocates_in_expandable_segments(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **before})
    assert init_from_env()
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == after
