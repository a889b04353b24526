"""A timer that ends the process even when its interpreter is blocked."""

from __future__ import annotations

import ctypes
import sys


class _Sigevent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("rest", ctypes.c_char * 32),
    )


class _Itimerspec(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "after_s", "after_ns"))


class ExitTimer:
    """A timer of the C library that calls `_exit(code)` in a thread of its own: it needs no interpreter (Linux;
    elsewhere nothing happens)."""

    def __init__(self, code: int) -> None:
        self._timer = ctypes.c_void_p()
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self._library:
            function = ctypes.cast(self._library._exit, ctypes.c_void_p).value
            monotonic, in_a_thread = 1, 2
            event = _Sigevent(value=code, notify=in_a_thread, function=function)
            failed = self._library.timer_create(monotonic, ctypes.byref(event), ctypes.byref(self._timer))
            assert not failed

    def set(self, seconds: float) -> None:
        if self._library:
            when = _Itimerspec(after_s=int(seconds), after_ns=int(seconds % 1 * 1e9))
            self._library.timer_settime(self._timer, 0, ctypes.byref(when), None)

    def cancel(self) -> None:
        self.set(0)
