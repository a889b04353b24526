"""Two nodes on this machine: network namespaces of their own, with a link whose faults a test selects.

Nothing has to be removed: the namespaces and the link exist as long as processes that end with this one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import cable
from bifrost.data.processes import die_with_parent
from cable import Link

NAMES = ("node1", "node2")
ADDRESSES = cable.ADDRESSES
INTERFACE = cable.INTERFACE


def missing() -> str | None:
    """What this machine lacks for such nodes, in one line; None where it lacks nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if programs := [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name)]:
        return f"{', '.join(programs)} not found: apt-get install iproute2 util-linux"
    if not Path("/dev/net/tun").exists():
        return "network namespaces need root, and /dev/net/tun, which is missing"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "network namespaces need root with CAP_SYS_ADMIN"
    return None


class TwoNodes:
    """Two connected nodes inside a `with` block."""

    def __enter__(self) -> TwoNodes:
        self._processes: list[subprocess.Popen] = []
        try:
            holders = [self._start("unshare", "--net", "sleep", "infinity") for _ in NAMES]
            for holder in holders:
                _wait_for_namespace(holder)
            self._pids = [holder.pid for holder in holders]
            self._cable = self._start(sys.executable, cable.__file__, *map(str, self._pids))
            self._expect("connected")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.communicate()

    def inside(self, node: int) -> list[str]:
        """Words before a command that run it on node 0 or 1."""
        return ["nsenter", f"--net=/proc/{self._pids[node]}/ns/net"]

    def set(self, link: Link) -> None:
        """Change the link; returns once it has changed."""
        assert self._cable.stdin
        self._cable.stdin.write(json.dumps(asdict(link)) + "\n")
        self._cable.stdin.flush()
        self._expect("set")

    def _start(self, *command: str) -> subprocess.Popen:
        # A session of its own: a Ctrl-C on the terminal ends this process first, and these with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        self._processes.append(process)
        return process

    def _expect(self, word: str) -> None:
        assert self._cable.stdout
        answer = self._cable.stdout.readline().strip()
        assert answer == word, f"the link has ended: {answer}"


def _wait_for_namespace(holder: subprocess.Popen) -> None:
    ours, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 10
    while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
        assert holder.poll() is None and time.monotonic() < deadline, "unshare --net failed"
        time.sleep(0.01)
