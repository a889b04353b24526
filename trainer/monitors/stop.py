"""Stop signals and the job's time limit: noticed here, acted on by all ranks at the same step."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def hold_signals() -> None:
    """Keep stop signals waiting until StopSignals is there: before it they would end the process without a save."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def ignore_signals() -> None:
    """The run is over: one more stop signal changes nothing, its exit code above all. Blocked, one would still reach
    another thread while Python, as it ends, gives signals their deadly default back."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Remembers that a stop signal came. A second SIGINT, an impatient person, interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._ends_at = math.inf
        self._needed_s: Callable[[], float] = lambda: 0.0
        for number in SIGNALS:
            signal.signal(number, self._notice)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def end_before(self, ends_at: float, needed_s: Callable[[], float]) -> None:
        """Stop, too, as soon as no more than `needed_s()` seconds are left until the Unix time `ends_at`."""
        self._ends_at, self._needed_s = ends_at, needed_s

    def asked(self) -> str | None:
        """Why this rank wants to stop, a signal's name or the time limit; None while it does not."""
        if self.received is not None:
            return self.received.name
        if time.time() < self._ends_at - self._needed_s():
            return None
        self._ends_at = -math.inf  # once it is too late, it stays so
        return "the job's time limit"

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
