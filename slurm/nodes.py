"""The nodes of an attempt on a cluster without Slurm: node 0 starts the attempt once all have joined.

Nodes may be scheduled hours apart. An attempt that began before all were there would end in a rendezvous timeout, and
count as one without progress.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from .errors import SlurmError

READ_S = 10.0
"""Seconds that a connection has to name its node, and node 0 to be reached."""
RETRY_S = 1.0
REPORT_S = 60.0
"""Seconds between lines about missing nodes."""


@dataclass(frozen=True)
class Node:
    """One of the machines, or pods, of an attempt; all have the same number of ranks."""

    rank: int
    """0 to count - 1; node 0 has rank 0."""
    count: int
    address: str
    """Host name or address of node 0."""
    port: int
    """Port of node 0: of this rendezvous first, then of the ranks' own."""


def join_nodes(node: Node, begin: Callable[[], None]) -> None:
    """Wait, without limit, until all nodes have joined. `begin` is then called on node 0, and after that every node
    returns; the SlurmError that it raises is raised on all nodes."""
    if node.rank == 0:
        _gather(node, begin)
    elif problem := _join(node):
        raise SlurmError(problem)


def _gather(node: Node, begin: Callable[[], None]) -> None:
    joined: dict[int, socket.socket] = {}
    with ExitStack() as opened:
        server = opened.enter_context(socket.socket())
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", node.port))
        except OSError as error:
            raise SlurmError(f"port {node.port} of node 0: {error.strerror}; another process has it") from error
        server.listen(node.count)
        server.settimeout(REPORT_S)
        while len(joined) < node.count - 1:
            with suppress(TimeoutError):
                connection = opened.enter_context(server.accept()[0])
                rank = _rank_of(connection)
                if 0 < rank < node.count:
                    joined[rank] = connection  # a node that was replaced meanwhile joins again
                continue
            missing = [str(rank) for rank in range(1, node.count) if rank not in joined]
            _say(f"waiting for {len(missing)} of {node.count} nodes: {', '.join(missing[:8])}")
        try:
            begin()
        except SlurmError as error:
            _release(joined, str(error))
            raise
        _release(joined, "")


def _release(joined: Mapping[int, socket.socket], problem: str) -> None:
    for connection in joined.values():
        with suppress(OSError):  # one that is gone is missed by the ranks' rendezvous
            connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")


def _rank_of(connection: socket.socket) -> int:
    """The node that a connection is from; -1 if it does not name one."""
    connection.settimeout(READ_S)
    try:
        return int(connection.recv(16))
    except (OSError, ValueError):
        return -1


def _join(node: Node) -> str:
    """Join node 0 and return its problem, if it has one. Node 0 may not exist yet, and may be replaced."""
    reported = time.monotonic()
    while True:
        try:
            with socket.create_connection((node.address, node.port), timeout=READ_S) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.settimeout(None)
                connection.sendall(str(node.rank).encode())
                if line := connection.makefile().readline():
                    return json.loads(line)["problem"]
        except OSError:  # also an unknown host name: that of a pod exists once the pod has an address
            pass
        if time.monotonic() - reported > REPORT_S:
            _say(f"node {node.rank} waits for node 0 at {node.address}:{node.port}")
            reported = time.monotonic()
        time.sleep(RETRY_S)


def _say(line: str) -> None:
    print(f"bifrost: {line}", file=sys.stderr, flush=True)
