"""Preflight with real processes as nodes: which node is named, exit codes, and that it ends in time."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bifrost.slurm.rank_env import free_port
from ranked import Rank, run

PRE = "123-0-0"


def node(rank: int) -> str:
    return f"node{rank + 1}"


def task(folder: str, size: int, port: int, case: dict) -> int:
    """One rank of the step on its own node. case: faults by rank."""
    from bifrost.slurm.preflight import Limits, find_rank_info, preflight
    from bifrost.slurm.preflight.fabric import Wire

    rank = int(os.environ["RANK"])
    mine = case.get(str(rank), {})
    if mine.get("absent"):
        return -1
    os.environ |= {
        "SLURMD_NODENAME": node(rank),
        "SLURM_STEP_NODELIST": f"node[1-{size}]",
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_ID": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **mine.get("environment", {}),
    }

    class Faulty(Wire):
        def receive(self, tensor, rank):
            super().receive(tensor, rank)
            if mine.get("wrong") and tensor.numel() > 1:
                tensor[12345] += 1

        def send(self, tensor, rank):
            if mine.get("fails"):
                raise RuntimeError("no route to host")
            if tensor.numel() > 1:
                time.sleep(mine.get("slow", 0))
            super().send(tensor, rank)

        def all_reduce(self, tensor):
            super().all_reduce(tensor)
            if mine.get("wrong_sum"):
                tensor[-1] += 1

        def clock(self):
            return super().clock() + mine.get("ahead", 0)

        def join(self, store, rank, size):
            if mine.get("dies"):
                os._exit(9)
            if mine.get("freezes"):
                subprocess.Popen(["sh", "-c", f"sleep {mine['freezes']}; kill -9 {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            super().join(store, rank, size)

    if mine.get("version"):
        from bifrost.slurm.preflight import node as checks

        checks.all_versions = lambda: {"deepspeed": mine["version"]}
    limits = {"slow": 0.02, "free_gib": 0.01, "scratch_gib": 0.01, "inodes": 1, "meet_s": 120, "fabric_s": 60}
    limits |= {"shared_s": 5, "grace_s": 5, **case.get("limits", {}), **mine.get("limits", {})}
    site = SimpleNamespace(bad_node_file=case.get("bad_node_file"), bad_node_threshold=3)
    return preflight(
        Path(mine.get("run", folder)),
        find_rank_info(),
        site,
        Limits(**limits),
        (),
        mine.get("command"),
        Faulty(int(os.environ["LOCAL_RANK"])),
    )


def step(folder: Path, size: int, **case) -> list[Rank]:
    """The ranks of a step on `size` nodes; faults by rank as n0, n1, …"""
    plain = {name[1:] if name[1:].isdigit() else name: value for name, value in case.items()}
    return run(task, size, str(folder), size, free_port(), plain)


def verdict(folder: Path) -> dict:
    return json.loads((folder / "preflight" / PRE / "verdict.json").read_text())


def codes(ranks: list[Rank]) -> list:
    assert not [rank.err for rank in ranks if "Traceback" in rank.err]
    return [rank.value for rank in ranks]


def bad(folder: Path) -> dict[str, str]:
    """Nodes that the run excludes -> reason."""
    book = json.loads((folder / "excluded.json").read_text())
    assert all(entry["times"] == 1 and time.time() - entry["last"] < 600 for entry in book.values())
    assert {name: entry["reason"] for name, entry in book.items()} == verdict(folder)["bad"]
    return verdict(folder)["bad"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with recipe and shards."""
    run_folder, shards = tmp_path / "run", tmp_path / "shards"
    run_folder.mkdir()
    shards.mkdir()
    (shards / "train-00000.tar").write_bytes(b"x" * 1000)
    (run_folder / "recipe.yaml").write_text(RECIPE.format(shards=shards))
    return run_folder


RECIPE = """
stage: patch-latents
name: run
steps: 1
global_batch: 2
micro_batch: 1
backbone: {{path: "builtin:tiny"}}
data: {{shards: "{shards}/train-*.tar"}}
"""


@pytest.mark.multi
def test_healthy_nodes(folder: Path) -> None:
    ranks = step(folder, 3)
    assert codes(ranks) == [0, 0, 0]
    assert not (folder / "excluded.json").exists()
    kept = verdict(folder)
    assert kept["code"] == 0 and set(kept["nodes"]) == {"node1", "node2", "node3"}
    found = {finding["check"]: finding for finding in kept["nodes"]["node2"]}
    for check in ("run folder", "temp", "shared run folder", "data", "recipe", "torch", "rendezvous", "clock"):
        assert found[check]["reason"] == "" and found[check]["figure"], check
    assert found["pair data"]["figure"] == "2 of 2 pairs exact"
    assert float(found["pair bandwidth"]["figure"].split()[0]) > 0
    assert "Preflight" in ranks[0].out and "3 nodes" in ranks[0].out and not ranks[1].out


@pytest.mark.slow
@pytest.mark.multi
def test_a_missing_node_is_named_in_bounded_time(folder: Path) -> None:
    start = time.monotonic()
    assert codes(step(folder, 3, n1={"absent": True}, limits={"meet_s": 15})) == [77, -1, 77]
    assert time.monotonic() - start < 100
    assert list(bad(folder)) == ["node2"] and "no report within 15 s" in bad(folder)["node2"]


@pytest.mark.slow
@pytest.mark.multi
def test_the_lowest_responsive_node_decides_if_the_first_is_missing(folder: Path) -> None:
    ranks = step(folder, 3, n0={"absent": True}, limits={"meet_s": 12})
    assert codes(ranks) == [-1, 77, 77]
    assert list(bad(folder)) == ["node1"]
    assert sum("Preflight" in rank.out for rank in ranks) == 1


@pytest.mark.slow
@pytest.mark.multi
def test_a_node_that_dies_during_the_network_check_is_named(folder: Path) -> None:
    ranks = step(folder, 3, n2={"dies": True}, limits={"fabric_s": 10})
    assert codes(ranks) == [77, 77, None]
    assert list(bad(folder)) == ["node3"] and "stopped responding" in bad(folder)["node3"]


@pytest.mark.multi
@pytest.mark.parametrize(("faulty", "partner"), [(0, "node3"), (2, "node2")])
def test_a_node_that_fails_early_while_the_others_wait(folder: Path, faulty: int, partner: str) -> None:
    """In round 1, node1 pairs with node3; in the next, node3 pairs with node2: both nodes of a pair stop."""
    limits = {"fabric_s": 12, "grace_s": 2}
    assert codes(step(folder, 3, **{f"n{faulty}": {"fails": True}}, limits=limits)) == [77] * 3
    assert set(bad(folder)) == {node(faulty), partner}
    assert "no route to host" in bad(folder)[node(faulty)] and "no answer within 12 s" in bad(folder)[partner]


@pytest.mark.multi
@pytest.mark.slow
def test_a_first_node_that_freezes_is_named(folder: Path) -> None:
    """Its store accepts requests and answers none: the store's own timeout does not fire."""
    limits = {"node_s": 10, "meet_s": 10, "fabric_s": 5, "shared_s": 2, "grace_s": 2}
    ranks = step(folder, 3, n0={"freezes": 60}, limits=limits)
    assert codes(ranks) == [None, 77, 77]
    assert list(bad(folder)) == ["node1"] and "did not join" in bad(folder)["node1"]


@pytest.mark.multi
def test_a_different_folder_at_the_same_path(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    assert codes(step(folder, 3, n2={"run": str(other)})) == [77, 77, 77]
    assert list(bad(folder)) == ["node3"] and "does not show" in bad(folder)["node3"]


@pytest.mark.multi
def test_several_faults_of_several_nodes_at_once(folder: Path, tmp_path: Path) -> None:
    """A missing folder, another version and a failing site command; the network checks are skipped."""
    faults = {
        "n1": {"run": str(tmp_path / "none")},
        "n2": {"version": "0.9"},
        "n3": {"command": "echo >&2; echo fan 3 does not turn >&2; exit 4"},
    }
    assert codes(step(folder, 4, n0={"command": "true"}, **faults)) == [77] * 4
    assert set(bad(folder)) == {"node2", "node3", "node4"}
    assert "not a folder" in bad(folder)["node2"]
    assert "0.9" in bad(folder)["node3"]
    assert bad(folder)["node4"] == "site command: fan 3 does not turn"
    assert "pair data" not in {finding["check"] for finding in verdict(folder)["nodes"]["node1"]}


@pytest.mark.multi
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"ahead": 30}, "clock: differs from most nodes' by +30 s"),
        ({"wrong": True}, "pair data: data differs"),
        ({"wrong_sum": True}, "all-reduce: sums are wrong"),
        ({"limits": {"free_gib": 1e9}}, "GiB free, 1e+09 required"),
    ],
)
def test_the_node_that_differs_is_bad(folder: Path, fault: dict, reason: str) -> None:
    assert codes(step(folder, 3, n1=fault)) == [77, 77, 77]
    assert list(bad(folder)) == ["node2"] and reason in bad(folder)["node2"]


@pytest.mark.slow
@pytest.mark.multi
def test_a_slow_node(folder: Path) -> None:
    assert codes(step(folder, 3, n1={"slow": 3.0}, limits={"slow": 1 / 3})) == [77, 77, 77]
    assert list(bad(folder)) == ["node2"] and "pair bandwidth: " in bad(folder)["node2"]


@pytest.mark.multi
@pytest.mark.parametrize(
    ("case", "line"),
    [
        ({"limits": {"inodes": 2**60}}, "on all 2 nodes: "),
        # With two clocks, it is unknown which one is right.
        ({"n1": {"ahead": 30}}, "on all 2 nodes: clock"),
    ],
)
def test_a_fault_on_all_nodes_excludes_none(folder: Path, case: dict, line: str) -> None:
    ranks = step(folder, 2, **case)
    assert codes(ranks) == [2, 2]
    assert not (folder / "excluded.json").exists()
    assert line in verdict(folder)["line"] and line in ranks[0].out


@pytest.mark.multi
def test_a_run_folder_missing_everywhere(tmp_path: Path) -> None:
    ranks = step(tmp_path / "none", 2)
    assert codes(ranks) == [2, 2]
    assert "not a folder on this node" in ranks[0].out and not (tmp_path / "none").exists()


@pytest.mark.multi
def test_a_port_in_use_is_a_fault_of_the_first_node(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        case = {"limits": {"meet_s": 10}}
        ranks = run(task, 2, str(folder), 2, taken.getsockname()[1], case)
    assert codes(ranks) == [77, 77]
    assert list(bad(folder)) == ["node1"] and "port" in bad(folder)["node1"]


@pytest.mark.multi
def test_bad_nodes_are_recorded_for_the_site(folder: Path, tmp_path: Path) -> None:
    from bifrost.slurm.exclusions import excluded

    bad_nodes = str(tmp_path / "bad_nodes.json")
    site = SimpleNamespace(bad_node_file=bad_nodes, bad_node_threshold=1)
    step(folder, 2, n0={"command": "true"}, n1={"command": "echo dust >&2; false"}, bad_node_file=bad_nodes)
    assert excluded(None, site) == excluded(folder, None) == ["node2"]
