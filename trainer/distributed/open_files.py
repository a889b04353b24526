"""The limit of open files, of which every rank needs some for each other rank."""

from __future__ import annotations

import resource

from ..errors import RunError

PER_RANK = 3
"""Sockets to every other rank: gloo connects all ranks of a process group to each other, and a rank is in up to three
such groups at once (training's own on CPUs, one while ranks compare their software, one of the checkpoints). Counted by
docs/benchmarks/rendezvous.py."""
OTHERS = 256
"""Files other than these sockets: shards, pipes to loader workers, libraries, logs."""


def allow_open_files(ranks: int) -> None:
    """Raise this process's soft limit to what a run on `ranks` ranks needs; 1,024, the usual one, suffices for 256.
    RunError if the hard limit is lower."""
    needed = PER_RANK * ranks + OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RunError(
            f"{ranks} ranks need up to {needed} open files each, and this machine allows {hard}: raise the hard limit"
            " (ulimit -Hn, LimitNOFILE of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
