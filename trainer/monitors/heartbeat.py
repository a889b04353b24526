"""Periodic actions in a background thread that training never waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Heartbeat:
    """Calls `actions`, which must not raise, every `seconds` inside a `with` block and at its end."""

    def __init__(self, seconds: float) -> None:
        self.actions: list[Callable[[], None]] = []
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(self._seconds)  # unavailable storage may block it for longer

    def _beat(self) -> None:
        over = False
        while not over:
            over = self._over.wait(self._seconds)
            for action in tuple(self.actions):
                action()
