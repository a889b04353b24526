"""What a rank asks of the rendezvous store, and the connections to other ranks that it holds, until the end of its
first step.

    .venv/bin/python docs/benchmarks/rendezvous.py [--ranks 2,4,8]

Every rank but 0, which opens the store, reaches it through a relay of its own, which counts messages and bytes. Stage 1
of the demo's recipe on small images, gloo, without tracking. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from startup import write_shards

from bifrost.slurm.rank_env import free_port


@dataclass
class Relay:
    """Counts what a rank sends to the store at `target`."""

    target: int
    connections: int = 0
    messages: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            rank, _ = self.listening.accept()
            try:
                store = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # rank 0 has not opened it yet: the rank tries again
                rank.close()
                continue
            self.connections += 1
            threading.Thread(target=self._pass, args=(rank, store, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(store, rank, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while received := source.recv(1 << 16):
                if counted:
                    self.messages += 1
                    self.bytes += len(received)
                sink.sendall(received)
        except OSError:
            pass
        finally:
            sink.close()


def measure(ranks: int, folder: Path) -> tuple[list[Relay], list[int]]:
    """The relays of ranks 1 and above, and per rank the most connections held at once."""
    port = free_port()
    relays = [Relay(port) for _ in range(1, ranks)]
    words = [sys.executable, "-m", "bifrost", "train", "tiny-mllm", f"name=on-{ranks}", "data.shards=shards/*.tar"]
    words += [f"global_batch={ranks}", "micro_batch=1", "steps=1", "data.workers=0", "tracking.enabled=false"]
    running = []
    for rank in range(ranks):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(relays[rank - 1].port if rank else port)}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        output = (folder / f"{ranks}-{rank}.log").open("w")
        running.append(subprocess.Popen(words, cwd=folder, env={**os.environ, **place}, stdout=output, stderr=output))
    most = [0] * ranks
    while any(process.poll() is None for process in running):
        for rank, process in enumerate(running):
            most[rank] = max(most[rank], connections(process.pid))
    assert not any(process.returncode for process in running), (folder / f"{ranks}-0.log").read_text()[-2000:]
    return relays, most


def connections(pid: int) -> int:
    """TCP connections of a process other than its one to the store."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return 0
    return sum(each.status == psutil.CONN_ESTABLISHED for each in found) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="2,4,8")
    asked = parser.parse_args()
    print("| ranks | connections to the store | messages to it | bytes to it | connections held to other ranks |")
    print("|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "shards")
        for ranks in map(int, asked.ranks.split(",")):
            relays, held = measure(ranks, folder)
            cells = [between(relay.connections for relay in relays), between(relay.messages for relay in relays)]
            cells += [between(relay.bytes for relay in relays), between(held[1:])]
            print(f"| {ranks} | {' | '.join(cells)} |", flush=True)


def between(counts: Iterable[int]) -> str:
    """The range of the ranks' counts."""
    found = sorted(counts)
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


if __name__ == "__main__":
    main()
