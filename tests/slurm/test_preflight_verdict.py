"""Which nodes are bad, as a pure function of the measurements."""

from dataclasses import replace
from itertools import combinations

import pytest

from bifrost.slurm.preflight.fabric import Link, Outcome, tournament
from bifrost.slurm.preflight.finding import Finding, Limits
from bifrost.slurm.preflight.verdict import compare, decide, fabric, missing_nodes

BAD = Finding("disk", "", "full")


def outcome(*links: Link, **fields) -> Outcome:
    return Outcome(steps=9, links=list(links), reduce_gb_s=1.0, done=True, **fields)


def link(partner: str, gb_s: float = 10.0, offset: float = 0.0, trip: float = 0.001, wrong: bool = False) -> Link:
    return Link(partner, gb_s, offset, trip, wrong)


def named(outcomes: dict[int, Outcome | None], nodes: dict[int, str]) -> dict[str, str]:
    return decide(fabric(outcomes, nodes, Limits()), in_job=True).bad


@pytest.mark.parametrize("players", range(1, 10))
def test_every_pair_plays_once(players: int) -> None:
    rounds = tournament(players)
    assert len(rounds) == (players - 1 if players % 2 == 0 else players)
    pairs = []
    for partners in rounds:
        for player, partner in enumerate(partners):
            assert partner is None or (partners[partner] == player and partner != player)
            pairs += [(player, partner)] if partner is not None and player < partner else []
    assert sorted(pairs) == list(combinations(range(players), 2))


def test_some_nodes_can_be_bad_but_not_all() -> None:
    fine = Finding("disk")
    assert decide({"a": [fine], "b": [BAD]}, True).bad == {"b": "disk: full"}
    assert decide({"a": [fine], "b": [BAD]}, True).code == 77
    both = decide({"a": [BAD], "b": [BAD]}, True)
    assert (both.code, both.bad, both.line) == (2, {}, "on all 2 nodes: disk: full")
    assert decide({"a": [fine], "b": [fine]}, True).code == 0


def test_a_single_node_is_bad_only_for_its_own_faults_and_in_a_job() -> None:
    own = Finding("ECC", "", "1 error", own=True)
    assert decide({"a": [own]}, True).bad == {"a": "ECC: 1 error"}
    assert decide({"a": [own]}, False).code == decide({"a": [BAD]}, True).code == 2


def test_a_bad_node_is_excluded_despite_a_common_fault() -> None:
    ecc = [Finding("ECC", "", "1", own=True)]
    assert decide({"a": [BAD, Finding("ECC")], "b": [BAD, *ecc]}, True).bad == {"b": "ECC: 1"}


def test_the_version_of_most_nodes_is_expected() -> None:
    def nodes(*figures: str) -> dict[str, list[Finding]]:
        return {f"n{i}": [Finding("torch", figure, same=True)] for i, figure in enumerate(figures)}

    assert decide(compare(nodes("2", "1", "2")), True).bad == {"n1": "torch: 1, most nodes have 2"}
    assert decide(compare(nodes("2", "1")), True).line == "on all 2 nodes: torch: differs between nodes: 1, 2"
    assert decide(compare(nodes("2", "2")), True).code == 0


def test_a_slow_gpu_makes_its_node_bad_and_not_its_partners() -> None:
    """Two GPUs per node; GPU 1 of node c is slow with every partner."""
    nodes = {rank: "abc"[rank // 2] for rank in range(6)}
    outcomes: dict[int, Outcome | None] = {}
    for rank, name in nodes.items():
        links = [link(other, 2.0 if rank % 2 and "c" in (name, other) else 10.0) for other in "abc" if other != name]
        outcomes[rank] = outcome(*links)
    assert named(outcomes, nodes) == {"c": "pair bandwidth: 2 GB/s, the other nodes' median is 10 GB/s"}


def test_a_node_below_a_third_of_the_median_is_slow() -> None:
    nodes = {0: "a", 1: "b", 2: "c"}
    for speed, bad in ((3.0, ["c"]), (4.0, [])):
        outcomes = {
            0: outcome(link("b"), link("c", speed)),
            1: outcome(link("a"), link("c", speed)),
            2: outcome(link("a", speed), link("b", speed)),
        }
        assert list(named(outcomes, nodes)) == bad


def test_neither_of_two_nodes_is_slow() -> None:
    assert named({0: outcome(link("b")), 1: outcome(link("a", 1.0))}, {0: "a", 1: "b"}) == {}


def test_a_clock_offset_must_exceed_half_the_round_trip() -> None:
    nodes = {0: "a", 1: "b", 2: "c"}
    for trip, bad in ((0.1, ["b"]), (3.0, [])):
        outcomes = {
            0: outcome(link("b", offset=2.0, trip=trip), link("c")),
            1: outcome(link("a", offset=-2.0, trip=trip), link("c", offset=-2.0, trip=trip)),
            2: outcome(link("a"), link("b", offset=2.0, trip=trip)),
        }
        assert list(named(outcomes, nodes)) == bad


def test_the_hung_rank_with_the_least_progress_is_named() -> None:
    nodes = {0: "a", 1: "b", 2: "c"}
    stuck = [Outcome(steps=steps, stage=f"round {steps}", trouble="no answer") for steps in (3, 2, 3)]
    assert named(dict(enumerate(stuck)), nodes) == {"b": "fabric: no answer"}
    assert named({0: stuck[0], 1: stuck[1], 2: None}, nodes) == {"c": "fabric: stopped responding during the check"}
    alike = {rank: Outcome(steps=1, trouble="joining: refused") for rank in range(3)}
    assert named(dict(alike), nodes) == {}


H200 = {"device": "NVIDIA H200", "product_tflops": 650.0, "copy_gb_s": 4000.0}


@pytest.mark.parametrize(
    ("slow", "reason"),
    [
        ({}, None),
        # A known model: the vendor's figures are 989 TFLOP/s and 4,800 GB/s.
        ({"product_tflops": 390.0}, "GPU product: GPU 1: 390 TFLOP/s, at least 396 expected of NVIDIA H200"),
        ({"copy_gb_s": 2300.0}, "GPU copy: GPU 1: 2.3e+03 GB/s, at least 2.4e+03 expected of NVIDIA H200"),
        ({"product_tflops": 480.0}, "GPU product: GPU 1: 480 TFLOP/s, the median of all GPUs is 650"),
        ({"wrong_products": True}, "GPU product: GPU 1: two runs of the same product differ"),
    ],
)
def test_a_slow_gpu(slow: dict, reason: str | None) -> None:
    nodes = {rank: "abc"[rank // 2] for rank in range(6)}
    outcomes: dict[int, Outcome | None] = {}
    for rank, name in nodes.items():
        links = [link(other, 40.0) for other in "abc" if other != name]
        outcomes[rank] = outcome(*links, **{**H200, **(slow if rank == 3 else {})})
    assert named(outcomes, nodes) == ({"b": reason} if reason else {})
    other = {rank: replace(each, device="Brand new") for rank, each in outcomes.items() if each}
    assert bool(named(dict(other), nodes)) == bool(slow), "found by the other GPUs of the same model, too"


def test_a_whole_cluster_on_a_slow_network_does_not_pass() -> None:
    """No node differs from the others: none is bad, and the port's bandwidth reveals the fault."""
    nodes = {rank: "abc"[rank] for rank in range(3)}
    for speed, code in ((1.0, 2), (30.0, 0)):
        outcomes: dict[int, Outcome | None] = {
            rank: outcome(*(link(other, speed) for other in "abc" if other != name), **H200)
            for rank, name in nodes.items()
        }
        found = decide(fabric(outcomes, nodes, Limits()), in_job=True)
        assert found.code == code and not found.bad
        if code:
            assert "on all 3 nodes: pair bandwidth: 1 GB/s, at least 2.5 expected of NVIDIA H200" in found.line
            assert "NCCL may use TCP" in found.line and "pair_share" in found.line
            assert decide(fabric(outcomes, nodes, Limits(pair_share=0.01)), in_job=True).code == 0


@pytest.mark.parametrize(
    ("size", "silent", "code"), [(2, 1, 77), (3, 1, 77), (3, 2, 2), (8, 2, 77), (8, 3, 2), (64, 63, 2)]
)
def test_many_unresponsive_nodes_are_not_excluded(size: int, silent: int, code: int) -> None:
    """The deciding node's own network may be at fault."""
    nodes = {rank: f"n{rank}" for rank in range(size)}
    deciding = Outcome(steps=2, stage="pair round 1", trouble="refused")
    outcomes = {rank: deciding if rank < size - silent else None for rank in nodes}
    present = {f"n{rank}": [rank] for rank in range(size - silent)}
    joined = {node: [Finding("torch", "2")] for node in present}
    joined |= missing_nodes(list(nodes.values()), present, size, {}, "none")
    for found in (decide(fabric(outcomes, nodes, Limits()), in_job=True), decide(joined, in_job=True)):
        assert found.code == code and len(found.bad) == (silent if code == 77 else 0)
        assert code == 77 or f"{silent} of {size} nodes did not report" in found.line
        assert "\n" not in found.line and len(found.line) < 300
