"""Network checks: every pair of nodes, then an all-reduce over all ranks; correctness first, then bandwidth.

Pairs form a round-robin tournament: in each round every node has one partner, and its ranks exchange data with the
partner's ranks of the same local number, all at the same time. Each pair sends a few small messages (clock offset,
round trip), then a payload in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from ..errors import first_line

PINGS, PAYLOADS, REDUCES = 5, 4, 3
PRODUCT, COPY, TRIES = 8192, 2**30, 6
"""Matrix size, bytes of the copy, repetitions of each."""


@dataclass(frozen=True)
class Link:
    """What one rank measured with one partner."""

    partner: str
    """The partner's node."""
    gb_s: float
    """Payload bytes over time, best of PAYLOADS."""
    offset_s: float
    """The partner's clock minus this one's."""
    round_trip_s: float
    wrong: bool
    """The received payload differs from the one sent."""


@dataclass
class Outcome:
    """Progress and measurements of one rank; filled in as the checks run."""

    steps: int = 0
    """0: its own GPU, 1: joining, 2: the first round of pairs, and so on, whether or not this rank takes part in it."""
    stage: str = "the start"
    trouble: str = ""
    links: list[Link] = field(default_factory=list)
    device: str = ""
    """Name of the rank's GPU; empty on a CPU, where nothing is measured."""
    product_tflops: float = 0.0
    copy_gb_s: float = 0.0
    wrong_products: bool = False
    """Two runs of the same product differ."""
    reduce_gb_s: float = 0.0
    """Bus bandwidth: 2 (n - 1) / n times the payload, over time."""
    wrong_sums: bool = False
    done: bool = False

    def reach(self, steps: int, stage: str) -> None:
        self.steps, self.stage = steps, stage

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> Outcome:
        return Outcome(**{**plain, "links": [Link(**link) for link in plain["links"]]})


class Wire:
    """Transport of the checks: torch.distributed, on this rank's device."""

    def __init__(self, local: int) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if self.gpu else torch.device("cpu")
        # Large enough that bandwidth dominates the latency of a message.
        self.elements = (16 if self.gpu else 1) * 2**20

    def measure_gpu(self, out: Outcome) -> None:
        """Measure this rank's GPU alone: a bf16 product, and a copy in its memory (bytes read and written)."""
        if not self.gpu:
            return
        torch.cuda.set_device(self.device)
        out.device = torch.cuda.get_device_name(self.device)
        factor = torch.randn(PRODUCT, PRODUCT, dtype=torch.bfloat16, device=self.device)
        first = factor @ factor
        out.product_tflops = 2 * PRODUCT**3 / self._best(lambda: factor @ factor) / 1e12
        out.wrong_products = not torch.equal(first, factor @ factor)
        source = torch.ones(COPY, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        out.copy_gb_s = 2 * COPY / self._best(lambda: target.copy_(source)) / 1e9

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of TRIES repetitions, without the first."""
        times = []
        for _ in range(TRIES):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def join(self, store: Store, rank: int, size: int) -> None:
        if self.gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.gpu else "gloo", store=store, rank=rank, world_size=size)

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        dist.send(tensor, rank)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        dist.recv(tensor, rank)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)

    def clock(self) -> float:
        return time.time()

    def synchronize(self) -> None:
        """Wait for the device, so that timings include the work."""
        if self.gpu:
            torch.cuda.synchronize()


def measure(wire: Wire, store: Store, rank: int, nodes: dict[str, list[int]], rounds: int, out: Outcome) -> None:
    """Fill `out`. nodes: node -> its ranks. An exception is recorded as `out.trouble`."""
    try:
        _measure(wire, store, rank, nodes, rounds, out)
        out.done = True
    except Exception as error:
        # A process group's errors are pages long.
        out.trouble = f"{out.stage}: {first_line(error)}"


def _measure(wire: Wire, store: Store, rank: int, nodes: dict[str, list[int]], rounds: int, out: Outcome) -> None:
    out.reach(0, "the GPU alone")
    wire.measure_gpu(out)
    out.reach(1, "joining")
    wire.join(store, rank, sum(len(ranks) for ranks in nodes.values()))
    names = list(nodes)
    own = next(name for name in names if rank in nodes[name])
    lane = nodes[own].index(rank)
    played = tournament(len(names))[:rounds]
    for number, partners in enumerate(played):
        partner = partners[names.index(own)]
        if partner is None or lane >= len(nodes[names[partner]]):
            continue
        out.reach(number + 2, f"pair round {number + 1} with {names[partner]}")
        out.links.append(_pair(wire, rank, nodes[names[partner]][lane], names[partner]))
    out.reach(len(played) + 2, "all-reduce")
    _reduce(wire, rank, sum(len(ranks) for ranks in nodes.values()), out)


def tournament(players: int) -> list[list[int | None]]:
    """Round-robin pairing by the circle method: round -> partner of each player, None for the one that is idle."""
    seats: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        partners: list[int | None] = [None] * players
        for left, right in zip(seats, reversed(seats), strict=True):
            if left is not None:
                partners[left] = right
        rounds.append(partners)
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _pair(wire: Wire, rank: int, other: int, name: str) -> Link:
    first = rank < other
    offset, trip = 0.0, float("inf")
    message = torch.zeros(1, dtype=torch.float64, device=wire.device)
    # The partner replies with its clock, then requests ours.
    for asking in (first, not first):
        for _ in range(PINGS):
            if asking:
                before = wire.clock()
                wire.send(message, other)
                wire.receive(message, other)
                theirs, after = float(message), wire.clock()
                if after - before < trip:
                    offset, trip = theirs - (before + after) / 2, after - before
            else:
                wire.receive(message, other)
                wire.send(message.fill_(wire.clock()), other)
    payload, arrived = _pattern(rank, wire), torch.empty_like(_pattern(other, wire))
    best, wrong = float("inf"), False
    for _ in range(PAYLOADS):
        wire.synchronize()
        start = time.perf_counter()
        if first:
            wire.send(payload, other)
            wire.receive(arrived, other)
        else:
            wire.receive(arrived, other)
            wire.send(payload, other)
        wire.synchronize()
        best = min(best, time.perf_counter() - start)
        wrong = wrong or not torch.equal(arrived, _pattern(other, wire))
    return Link(name, 2 * payload.nbytes / best / 1e9, offset, trip, wrong)


def _reduce(wire: Wire, rank: int, size: int, out: Outcome) -> None:
    # Small integers: their sums are exact in fp32 in any order, for up to 60,000 ranks.
    steps = torch.arange(wire.elements, device=wire.device) % 256
    expected = (steps * size + sum(each % 16 for each in range(size))).float()
    best = float("inf")
    for _ in range(REDUCES):
        tensor = (steps + rank % 16).float()
        wire.synchronize()
        start = time.perf_counter()
        wire.all_reduce(tensor)
        wire.synchronize()
        best = min(best, time.perf_counter() - start)
        out.wrong_sums = out.wrong_sums or not torch.equal(tensor, expected)
    out.reduce_gb_s = 2 * (size - 1) / size * expected.nbytes / best / 1e9


def _pattern(rank: int, wire: Wire) -> torch.Tensor:
    """Values that identify their sender and their position."""
    return (torch.arange(wire.elements, dtype=torch.int32, device=wire.device) * 31 + rank * 7919) % 65521
