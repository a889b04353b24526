"""The rendezvous of an attempt's ranks, with an error that names the missing ones.

Each rank registers in a store when it joins, and again when its device is ready. Rank 0 waits for all ranks up to a
time limit and publishes the verdict in the store. If the ranks cannot start, rank 0 leaves last: it holds the store.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from ...slurm.errors import first_line
from ...slurm.exit_codes import HUNG
from ...slurm.exit_record import attempt_id, record_outcome
from ...slurm.rank_env import expand_hosts, host_name
from ..errors import RendezvousTimeout, RunError

T = TypeVar("T")

AGENT_S = 10.0
"""Seconds for which a rank tries to reach torchrun's agent."""
LONGER = 1.2
"""Time limit of the other ranks to reach rank 0, as a multiple of that of rank 0: it names the ranks that it misses and
their node, and the first reason recorded counts."""
READ_S = 10.0
"""Seconds that the other ranks have to read why they cannot start, before rank 0 leaves with the store."""


def interruptible(wait: Callable[[], T], timeout_s: float | None = None) -> T:
    """The result of `wait`, which runs in a thread of its own so that signal handlers can run in this one:
    torch's waits for other ranks return to Python only when they end. Raises TimeoutError after `timeout_s`; the
    thread then continues until the process ends."""
    result: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            result.set_result(wait())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    if not futures.wait([result], timeout_s).done:
        raise TimeoutError(f"no result within {timeout_s} s")
    return result.result()


def join_store(rank: int, size: int, wait_s: float) -> Store:
    """The store of this attempt, in which this rank is registered; RendezvousTimeout if rank 0 does not open one.

    BIFROST_RENDEZVOUS names a file for ranks of one machine (no port to conflict); otherwise rank 0 opens a store
    at MASTER_ADDR and MASTER_PORT.
    """
    if file := os.environ.get("BIFROST_RENDEZVOUS"):
        store: Store = FileStore(file, size)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait_s *= 1 if rank == 0 else LONGER
        try:
            opened = TCPStore(address, port, size, rank == 0, timedelta(seconds=wait_s), wait_for_workers=False)
        except RuntimeError as error:
            if rank == 0:
                raise RendezvousTimeout(
                    f"rank 0: port {port} of {host_name()} is taken: {first_line(error)}"
                ) from error
            raise RendezvousTimeout(
                f"rank {rank}: rank 0 cannot be reached at {address}:{port} within {wait_s:.0f} s"
            ) from error
        # The prefix keeps out ranks of an attempt that Slurm believes dead, or of a job whose id gives the same port.
        store = PrefixStore(attempt_id(), opened)
    store.set(f"joined-{rank}", host_name())
    return store


def wait_for_all(store: Store, rank: int, size: int, wait_s: float, problem: str = "") -> None:
    """Wait for all ranks, after this rank's device is ready. Raises RendezvousTimeout naming the missing ranks.

    problem: why this rank cannot use its device; raised as RunError on every rank.
    """
    if problem:
        store.set("problem", problem)
    store.set(f"ready-{rank}", "")
    if rank == 0:
        verdict, host = _missing(store, size, wait_s)
        if verdict:
            record_outcome(HUNG, verdict, host=host)
        store.set("verdict", verdict)
    else:
        try:
            # Rank 0's time limit starts when it joins, which may be later than this rank.
            store.wait(["verdict"], timedelta(seconds=2 * wait_s))
            verdict = store.get("verdict").decode()
        except RuntimeError as error:
            raise RendezvousTimeout(
                f"rank {rank}: rank 0 did not join, or it exited or stalled before all ranks had joined"
            ) from error
    if verdict:
        failure: Exception = RendezvousTimeout(verdict)
    elif store.check(["problem"]):
        failure = RunError(store.get("problem").decode())
    else:
        return
    if rank == 0:
        _wait_for_readers(store, size)
    else:
        store.set(f"read-{rank}", "")
    raise failure


def connect(start: Callable[[], object], size: int, wait_s: float, backend: str) -> None:
    """Connect all ranks, which have joined, by `start`. Raises RendezvousTimeout if that takes longer than `wait_s`:
    a closed port answers nothing, and `backend` alone would wait for as long as a collective may take."""
    try:
        interruptible(start, wait_s)
    except TimeoutError as error:
        variable = f"{backend.upper()}_SOCKET_IFNAME"
        raise RendezvousTimeout(
            f"all {size} ranks joined, but they could not connect to each other within {wait_s:.0f} s: open all ports"
            f" between the nodes, not only {os.environ.get('MASTER_PORT')}, and check {variable}"
            f" ({os.environ.get(variable, 'not set')}), which is fabric.interface of the site file"
        ) from error


def _wait_for_readers(store: Store, size: int) -> None:
    """Wait until the ranks that are ready have read why they cannot start, READ_S at most."""
    if readers := [f"read-{rank}" for rank in range(1, size) if store.check([f"ready-{rank}"])]:
        with suppress(RuntimeError):  # one of them has died meanwhile
            store.wait(readers, timedelta(seconds=READ_S))


def require_agent(rank: int) -> None:
    """RunError if torchrun's variables are set but its agent does not listen: an earlier torchrun left them. The agent
    starts before its ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    deadline = time.monotonic() + AGENT_S
    while True:
        try:
            socket.create_connection((address, port), timeout=AGENT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"rank {rank}: torchrun's variables are set, but nothing answers at {address}:{port}"
                    f" ({error.strerror or error}): unset TORCHELASTIC_RUN_ID RANK WORLD_SIZE LOCAL_RANK if an earlier"
                    " torchrun left them"
                ) from error
        time.sleep(0.5)


def _missing(store: Store, size: int, wait_s: float) -> tuple[str, str | None]:
    """One line on the ranks that are not ready within `wait_s`, and their host if there is one; empty if all are."""
    try:
        store.wait([f"ready-{rank}" for rank in range(size)], timedelta(seconds=wait_s))
        return "", None
    except RuntimeError:
        joined = {rank: store.get(f"joined-{rank}").decode() for rank in range(size) if store.check([f"joined-{rank}"])}
        ready = {rank for rank in joined if store.check([f"ready-{rank}"])}
        # The last one may have joined just now.
        return ("", None) if len(ready) == size else describe_missing(size, wait_s, joined, ready, _nodes())


def describe_missing(
    size: int, wait_s: float, joined: Mapping[int, str], ready: set[int], nodes: Sequence[str]
) -> tuple[str, str | None]:
    """A line on the ranks that are not ready, and their host if it is a single one.

    joined: hosts of the ranks that have joined. nodes: those of the Slurm step, empty if unknown.
    """
    blocked = {rank: host for rank, host in joined.items() if rank not in ready}
    if len(joined) == size:
        hosts = list(dict.fromkeys(blocked.values()))
        line = f"{_some(list(blocked))} of {size} joined, but no device was ready there within {wait_s:.0f} s"
    else:
        counts = Counter(joined.values())
        # Every node has the same number of ranks: launchers start them so, and check_ranks refuses other layouts.
        hosts = [] if not nodes or size % len(nodes) else [n for n in nodes if counts[n] < size // len(nodes)]
        missing = [rank for rank in range(size) if rank not in joined]
        line = f"{_some(missing)} of {size} did not join within {wait_s:.0f} s"
    where = f", on {_listed(hosts)}" if hosts else ""
    return f"{line}{where}", hosts[0] if len(hosts) == 1 else None


def _some(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed([str(rank) for rank in ranks])}"


def _listed(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _nodes() -> list[str]:
    listed = os.environ.get("SLURM_STEP_NODELIST") if "SLURM_STEP_ID" in os.environ else None
    return expand_hosts(listed) if listed else []
