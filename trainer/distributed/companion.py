"""A process next to rank 0 that does what training must not wait for, until the run ends."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

QUIET_S = 2.0
"""Seconds for which the end of a run waits without a message."""


class Companion:
    """Handle of the process, which ends by itself some time after the one that started it."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, say: Callable[[str], None]) -> None:
        """say: prints each line that the process writes to its standard output."""
        self.process = process
        self.say = say
        threading.Thread(target=self._listen, name=name, daemon=True).start()

    def end(self) -> None:
        """Signal the end of the run."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it ended before
            self.process.stdin.write(b"end")
            self.process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Whether the process has ended, after at most this time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))
        return self.process.returncode is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def succeeded(self) -> bool:
        return self.process.returncode == 0

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.say(line.decode(errors="replace").rstrip())


def start(module: str, arguments: Sequence[str], output: Path, say: Callable[[str], None]) -> Companion:
    """Start `python -m module *arguments PID` in the background; its standard error is appended to `output`. Raises
    OSError."""
    output.parent.mkdir(exist_ok=True)
    with open(output, "ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
    return Companion(process, module.rpartition(".")[2], say)


class Parent:
    """State of the process that started this one, by the pipe on standard input and its process id."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.over = False
        """Whether the run has ended."""
        # Slurm signals every process of a job, but only the training process decides when the run ends.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        os.nice(10)

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the end of the run."""
        if self.over:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            os.read(0, 16)
            self.over = True
        elif os.getppid() != self.pid:  # killed, while a forked child of it still holds the pipe
            self.over = True

    def tell(self, line: str) -> None:
        """Print a line for the user."""
        with suppress(OSError):  # it is gone
            print(line, flush=True)
