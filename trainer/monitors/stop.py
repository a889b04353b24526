"""Stop signals: noticed here, acted on by all ranks at the same step."""

from __future__ import annotations

import signal
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
        for number in SIGNALS:
            signal.signal(number, self._notice)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
