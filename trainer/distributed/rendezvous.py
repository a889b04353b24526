"""Where the ranks of one start meet, and which of them never came.

Each rank says in a store that it has come, and once more when its device has answered. Rank 0 waits for all, for so
long and no longer, and says the verdict to the others.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from ...slurm.exit_codes import HUNG
from ...slurm.exit_record import record_outcome, this_start
from ...slurm.rank_env import expand_hosts, host_name
from ..errors import RendezvousTimeout, RunError

T = TypeVar("T")

AGENT_S = 10.0
"""How long a rank tries to reach torchrun's agent."""


def interruptible(wait: Callable[[], T]) -> T:
    """The result of `wait`, which runs in a thread of its own, so that signal handlers run in this one meanwhile:
    torch's waits for other ranks return to Python only when they are over."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(wait())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    return result.result()


def come(rank: int, size: int, wait_s: float) -> Store:
    """The store of this start, in which this rank has said that it has come; RendezvousTimeout when rank 0 opens none.

    BIFROST_RENDEZVOUS names a file for ranks of one machine (no port to be taken); otherwise rank 0 opens a store at
    MASTER_ADDR and MASTER_PORT.
    """
    if file := os.environ.get("BIFROST_RENDEZVOUS"):
        store: Store = FileStore(file, size)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            opened = TCPStore(address, port, size, rank == 0, timedelta(seconds=wait_s), wait_for_workers=False)
        except RuntimeError as error:
            if rank == 0:
                raise RendezvousTimeout(
                    f"rank 0: port {port} of {host_name()} is taken: {_first_line(error)}"
                ) from error
            raise RendezvousTimeout(
                f"rank {rank}: rank 0 cannot be reached at {address}:{port} within {wait_s:.0f} s"
            ) from error
        # A rank of a start that Slurm believes dead, or of a job whose id gives the same port, would pass for ours.
        store = PrefixStore(this_start(), opened)
    store.set(f"came-{rank}", host_name())
    return store


def meet(store: Store, rank: int, size: int, wait_s: float, problem: str = "") -> None:
    """Wait for all ranks, once this rank's device has answered. Raises RendezvousTimeout naming a missing rank.

    problem: why this rank cannot use its device; RunError on every rank with one of these.
    """
    if problem:
        store.set("problem", problem)
    store.set(f"ready-{rank}", "")
    if rank == 0:
        verdict, host = _missing(store, size, wait_s)
        if verdict:
            record_outcome(HUNG, verdict, host=host)
        store.set("met", verdict)
    else:
        try:
            # It decides so long after its own coming, which may be later than this rank's.
            store.wait(["met"], timedelta(seconds=2 * wait_s))
            verdict = store.get("met").decode()
        except RuntimeError as error:
            raise RendezvousTimeout(
                f"rank {rank}: rank 0 has not come, or has left or stands still before all had met"
            ) from error
    if verdict:
        raise RendezvousTimeout(verdict)
    if store.check(["problem"]):
        raise RunError(store.get("problem").decode())


def require_agent(rank: int) -> None:
    """RunError where torchrun's variables are set, and nobody listens where its agent would: an earlier one left them.
    The agent is there before any of its ranks."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _missing(store: Store, size: int, wait_s: float) -> tuple[str, str | None]:
    """Who is not ready within `wait_s`, in one line, and the host if it is a single one; nothing to say if all are."""
    try:
        store.wait([f"ready-{rank}" for rank in range(size)], timedelta(seconds=wait_s))
        return "", None
    except RuntimeError:
        came = {rank: store.get(f"came-{rank}").decode() for rank in range(size) if store.check([f"came-{rank}"])}
        ready = {rank for rank in came if store.check([f"ready-{rank}"])}
        # The last one may have come just now.
        return ("", None) if len(ready) == size else absence(size, wait_s, came, ready, _nodes())


def absence(
    size: int, wait_s: float, came: Mapping[int, str], ready: set[int], nodes: Sequence[str]
) -> tuple[str, str | None]:
    """A line on the ranks that are not ready, and their host if it is a single one.

    came: hosts of the ranks that have come. nodes: of the whole step, empty where nobody knows them.
    """
    blocked = {rank: host for rank, host in came.items() if rank not in ready}
    if len(came) == size:
        hosts = list(dict.fromkeys(blocked.values()))
        line = f"{_some(list(blocked))} of {size} came, but no device answered there within {wait_s:.0f} s"
    else:
        counts = Counter(came.values())
        # As many ranks on each node: the launchers start them so, and the table of ranks refuses others.
        hosts = [] if not nodes or size % len(nodes) else [n for n in nodes if counts[n] < size // len(nodes)]
        line = (
            f"{_some([rank for rank in range(size) if rank not in came])} of {size} did not come within {wait_s:.0f} s"
        )
    where = f", on {_listed(hosts)}" if hosts else ""
    return f"{line}{where}", hosts[0] if len(hosts) == 1 else None


def _some(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed([str(rank) for rank in ranks])}"


def _listed(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _nodes() -> list[str]:
    listed = os.environ.get("SLURM_STEP_NODELIST") if "SLURM_STEP_ID" in os.environ else None
    return expand_hosts(listed) if listed else []
