"""Ctrl-C on a command that has nothing to save: one line at once, exit code 130 within a second, no traceback.

A training rank has `stop_signals.py` instead, and a launcher of ranks `launcher.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from ...slurm.exit_codes import INTERRUPTED
from .exit_timer import ExitTimer

UNWIND_S = 0.7
"""Seconds that a command has to clean up after Ctrl-C."""
CONTINUED = {("data", "demo"), ("data", "ingest"), ("data", "encode"), ("generate",)}
"""Commands that keep finished work when they are run again."""
SHOW_CURSOR = "\x1b[?25h"


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process: what is open is closed, for UNWIND_S at most."""
    process, timer = os.getpid(), ExitTimer(INTERRUPTED)

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        if os.getpid() != process:  # forked: the parent prints the line
            os._exit(INTERRUPTED)
        say(interrupted())
        timer.set(UNWIND_S)  # in case threads or a bare except delay the exit
        raise SystemExit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def interrupted() -> str:
    """The line to print on Ctrl-C, for the command that this process runs."""
    words = tuple(sys.argv[1:3])
    continued = words in CONTINUED or words[:1] in CONTINUED
    return "interrupted" + ("; the same command continues where it stopped" if continued else "")


def say(line: str) -> None:
    """Print on standard error from a signal handler: bypasses Python's buffers, which the signal may have interrupted.
    On a terminal it also shows the cursor, which a progress bar may have hidden."""
    # On a terminal the line begins after the ^C that it shows.
    text = f"{SHOW_CURSOR}\n{line}\n" if os.isatty(2) else f"{line}\n"
    try:
        os.write(2, text.encode())
    except OSError:  # the terminal is gone
        return
