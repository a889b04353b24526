"""Ranks: which one this process is, or starting N of them on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..data.processes import die_with_parent
from ..slurm import launched_by, private_folders, rank_environment
from ..slurm.codes import DONE, FAILED
from ..slurm.ranks import LAUNCHER_VARIABLES
from .monitors.stop import SIGNALS

GRACE_S = 10.0
"""After one rank has failed, how long the others may take to leave by themselves."""


def adopt_rank(ranks: int | None = None) -> bool:
    """Whether this process is one of the ranks that a launcher started, whose variables it then adopts.

    ranks: what --ranks says. With it, or where no launcher is, this process is none, and forgets what an earlier
    launcher may have left in its environment. Raises SlurmError for variables that contradict each other.
    """
    launcher = launched_by(os.environ) if ranks is None else None
    if launcher is None:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        return False
    if launcher == "bifrost":
        die_with_parent(int(os.environ["BIFROST_LAUNCHER"]))
    os.environ.update(rank_environment(os.environ) or {})
    if launcher == "slurm":
        os.environ.update(private_folders(os.environ))
        tempfile.tempdir = None  # asked for before, it would stay the old one
    return True


def run_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m bifrost.trainer ARGUMENTS` as `ranks` ranks on this machine; returns their exit code.

    Stop signals are passed on to every rank. When one rank fails the others are ended, and its code is returned.
    """
    with tempfile.TemporaryDirectory(prefix="bifrost-") as folder:
        processes = [_start(rank, ranks, arguments, Path(folder)) for rank in range(ranks)]

        def forward(number: int, _: object) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in SIGNALS}
        # In an srun step they have been held back since the first import.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            return _wait(processes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in processes:
                process.kill()
                process.wait()


def _start(rank: int, ranks: int, arguments: Sequence[str], folder: Path) -> subprocess.Popen:
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        **os.environ,
        # Local ranks meet at a file and talk over loopback: no port to be taken, no host name to resolve.
        "BIFROST_RENDEZVOUS": str(folder / "rendezvous"),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "BIFROST_LAUNCHER": str(os.getpid()),
        # The checkout's `kernels/` and `data/` must not shadow distributions of those names.
        "PYTHONSAFEPATH": "1",
    }
    # A session of its own: a Ctrl-C on the terminal reaches the ranks once, through us.
    return subprocess.Popen(
        [sys.executable, "-m", "bifrost.trainer", *arguments], env=environment, start_new_session=True
    )


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """Wait for all ranks, or after the first failure for GRACE_S."""
    deadline = None
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if None not in codes or (deadline and time.monotonic() > deadline):
            # A rank that died of a signal explains the others' failures, and so does one that left on purpose.
            return min(failed, key=lambda code: (code > 0, code == FAILED), default=DONE)
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        time.sleep(0.05)
