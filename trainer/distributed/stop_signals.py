"""Stop signals and the job's time limit: recorded here, acted on by all ranks at the same step."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ...slurm.exit_codes import INTERRUPTED, STOPPED
from .interrupt import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

STARTING, TRAINING, ENDING = "starting", "training", "ending"
"""What an interruption costs in each phase: nothing yet, the steps since the last save, nothing any more."""
PHASE_FILE = "BIFROST_PHASE"
"""Variable that names the file in which rank 0 writes the phase for its launcher."""
SAVING = "saving; press Ctrl-C again to quit without saving"
NOTHING_YET = "interrupted before the first step; there was nothing to save"
QUIT = "quit without saving; the same command continues from the last checkpoint"
NOT_BEGUN = "stopped by {} before training began; there was nothing to save, the same command starts it again"
SAVED = "all is saved; not waiting for MLflow any longer"
QUIT_SAVED = "quit; all is saved"


def farewell(phase: str) -> str:
    """The line to print when an attempt is ended at once."""
    return {STARTING: NOTHING_YET, ENDING: QUIT_SAVED}.get(phase, QUIT)


def end_on_signals() -> None:
    """Until StopSignals is installed, a stop signal ends this rank at once, even during imports: there is nothing to
    save."""
    for number in SIGNALS:
        signal.signal(number, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave(number: int, frame: FrameType | None = None) -> None:
    """End this rank, which may be the only one to receive the signal: without our launcher, each prints a line."""
    if "BIFROST_LAUNCHER" not in os.environ:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
        line = NOTHING_YET if number == signal.SIGINT else NOT_BEGUN.format(signal.Signals(number).name)
        say(line if rank == "0" else f"rank {rank}: {line}")
    os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)


def ignore_signals() -> None:
    """Ignore stop signals after the run, so that they do not change its exit code. A blocked signal would still reach
    another thread once Python restores the default handlers at exit."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Records stop signals. Ctrl-C is answered at once; a second one ends the process without a save, and so does the
    first one on a launched rank that has not begun to train. Once all is saved, the first one ends the wait for
    MLflow."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.phase = STARTING
        self.joined = False
        """Whether all ranks have joined. Before that, which may take minutes when one is missing, any stop signal ends
        the process: there is nothing to save, and other ranks cannot be reached."""
        self.at_quit: list[Callable[[], None]] = []
        """Actions before the process ends without a save: quick, and safe in a signal handler."""
        self._ends_at = math.inf
        self._needed_s: Callable[[], float] = lambda: 0.0
        self._pressed_in: str | None = None  # the phase of the last Ctrl-C
        self._waiting = False
        self._launched = "BIFROST_LAUNCHER" in os.environ
        self._prints = not self._launched and os.environ.get("RANK", "0") == "0"
        for number in SIGNALS:
            signal.signal(number, self._notice)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def end_before(self, ends_at: float, needed_s: Callable[[], float]) -> None:
        """Also stop as soon as no more than `needed_s()` seconds are left until the Unix time `ends_at`."""
        self._ends_at, self._needed_s = ends_at, needed_s

    def asked(self) -> str | None:
        """Why this rank wants to stop, a signal's name or the time limit; None while it does not."""
        if self.received is not None:
            return self.received.name
        if time.time() < self._ends_at - self._needed_s():
            return None
        self._ends_at = -math.inf  # once it is too late, it stays so
        return "the job's time limit"

    def announce(self) -> None:
        """Write the phase, which all ranks have reached, for the launcher; called on rank 0."""
        if place := os.environ.get(PHASE_FILE):
            with suppress(OSError):  # Ctrl-C is then handled as before training
                Path(place).write_text(self.phase)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wrap work that Ctrl-C may cut short, after all is saved."""
        self._waiting = True
        with suppress(KeyboardInterrupt):
            yield
        self._waiting = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if not self.joined:
            leave(number)
        if number == signal.SIGINT:
            if self._pressed_in == self.phase or (self._launched and self.phase == STARTING):
                self._quit()
            self._pressed_in = self.phase
            if self._prints:
                say(SAVED if self.phase == ENDING else SAVING)
        self.received = signal.Signals(number)
        if number == signal.SIGINT and self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    def _quit(self) -> None:
        if self._prints:
            say(farewell(self.phase))
        for action in self.at_quit:
            with suppress(OSError):
                action()
        os._exit(INTERRUPTED)
