"""Ends a run that hangs: all ranks' stacks, the rank that the others wait for, and a code that asks for a new start.

A thread of every rank looks at the rank's own `Sections`. Training is in lockstep, so when one rank hangs all of them
are silent soon after; each then writes its stacks to the run folder, and the lowest rank that can speaks for all.
Two clocks of the operating system stand behind the thread, for a rank whose interpreter is blocked as a whole.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ...recipes.schema import Watchdog as Settings
from ...slurm.codes import HUNG
from ...slurm.record import record_outcome
from ..ranks import Ranks
from .metrics import MetricsFile
from .sections import Sections
from .stacks import Answer, culprit, read_answers, recorded_collectives, thread_at, write_answer, write_json

POLL_S = 1.0
ANSWER_S = 10.0
"""For which the ranks wait for one another's answers."""
LAST_S = 30.0
"""After which a rank that hangs is ended, whatever its storage does."""
FLOOR_S, STEPS = 100.0, 20
"""The automatic bound: so many usual steps, and no less than so many seconds."""


class Watchdog:
    """Watches `sections` inside a `with` block of the training thread."""

    def __init__(self, settings: Settings, sections: Sections) -> None:
        self.settings = settings
        self.sections = sections
        self._training = threading.get_ident()
        self._folder: Path | None = None
        self._file: TextIO | None = None
        self._hosts: Sequence[str] = ()
        self._rank = int(os.environ.get("RANK", "0"))
        self._over = threading.Event()
        self._exit = _ExitTimer()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.sections.on_ordinary = self._set_timers
        self._thread.start()
        return self

    def meet(self, ranks: Ranks, folder: Path) -> Sequence[str]:
        """The ranks know each other and own the run: from now on answers go to `folder/stacks/START`. For all ranks;
        returns their hosts."""
        # Nodes of a cluster on one machine have names of their own.
        host = os.environ.get("SLURMD_NODENAME") or platform.node()
        answers = ranks.gather((host, time.strftime("%Y%m%d-%H%M%S", time.gmtime())))
        hosts, starts = zip(*answers, strict=True)
        place = folder / "stacks" / starts[0]
        place.mkdir(parents=True, exist_ok=True)
        # Open beforehand: what writes into it in the end may be unable to open anything.
        self._file = open(place / f"rank-{ranks.rank:05d}.txt", "w")  # noqa: SIM115
        self._rank, self._hosts, self._folder = ranks.rank, hosts, place
        return hosts

    def __exit__(self, *_: object) -> None:
        """The run is over. Ranks that had nothing to say leave nothing in the run folder."""
        self._over.set()
        self._thread.join()
        if self._folder and self._file:
            self._file.close()
            with suppress(OSError):
                (self._folder / f"rank-{self._rank:05d}.txt").unlink()
                self._folder.rmdir()
                self._folder.parent.rmdir()
                self._folder.parents[1].rmdir()

    def bound_s(self) -> float:
        """Seconds that the step under way may take in all."""
        settings, usual = self.settings, self.sections.median_step()
        step = settings.step_s or (max(FLOOR_S, STEPS * usual) if usual else settings.start_s)
        return {"start": settings.start_s, "long": settings.save_s, "step": step}[self.sections.patience]

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            silent, bound = time.monotonic() - self.sections.last_step, self.bound_s()
            if silent > bound or (silent > bound / 2 and self._asked()):
                self._end(silent, bound)
            self._set_timers()
        self.sections.on_ordinary = lambda: None
        faulthandler.cancel_dump_traceback_later()
        self._exit.cancel()

    def _set_timers(self) -> None:
        """They go off only if the thread cannot put them off again. A long bound that ends between two of its looks
        must not stay with them, so the training thread sets them then."""
        rest = max(0.0, self.bound_s() - (time.monotonic() - self.sections.last_step))
        faulthandler.dump_traceback_later(rest + 2 * POLL_S, file=self._file or sys.stderr)
        self._exit.set(rest + LAST_S)

    def _asked(self) -> bool:
        """Whether another rank has given up waiting; looked for only when this one waits too."""
        with suppress(OSError):
            return self._folder is not None and any(self._folder.glob("rank-?????.json"))
        return False

    def _end(self, silent: float, bound: float) -> None:
        self._exit.set(LAST_S)
        if self._folder is None or self._file is None:
            faulthandler.dump_traceback(sys.stderr)
            _say(f"no step for {silent:.0f} s (bound {bound:.0f} s), before the ranks had met; stacks above")
        else:
            try:
                self._answer_and_report(self._folder, self._file, silent, bound)
            except OSError as error:
                faulthandler.dump_traceback(sys.stderr)
                _say(f"rank {self._rank} hangs and {self._folder} cannot be written ({error.strerror}); stacks above")
        os._exit(HUNG)

    def _answer_and_report(self, folder: Path, file: TextIO, silent: float, bound: float) -> None:
        sections = self.sections
        trace, collectives, collective = recorded_collectives()
        answer = Answer(
            rank=self._rank,
            host=self._hosts[self._rank],
            pid=os.getpid(),
            step=sections.step,
            section=sections.name,
            silent_s=silent,
            entered=sections.entered,
            collectives=collectives,
            collective=collective,
            at=thread_at(self._training),
        )
        write_answer(folder, answer, file, trace)
        deadline = time.monotonic() + ANSWER_S
        while len(answers := read_answers(folder)) < len(self._hosts) and time.monotonic() < deadline:
            time.sleep(0.5)
            os.utime(folder)  # a network file system then asks the server again what the folder holds
        if answers[0].rank == self._rank:
            self._report(folder, answers, silent, bound)
        while not (folder / "report.json").exists() and time.monotonic() < deadline + ANSWER_S:
            time.sleep(0.5)
            os.utime(folder)

    def _report(self, folder: Path, answers: Sequence[Answer], silent: float, bound: float) -> None:
        rank, clause = culprit(answers, self._hosts)
        run = folder.parents[1]
        where = folder.relative_to(run)
        first = next((answer for answer in answers if answer.rank == rank), None)
        event = {
            "event": "hung",
            "step": answers[0].step,
            "rank": rank,
            "host": self._hosts[rank] if rank is not None else None,
            "section": first.section if first else None,
            "collective": answers[0].collective,
            "silent_s": silent,
            "bound_s": bound,
            "stacks": str(where),
        }
        _say(f"no step for {silent:.0f} s (bound {bound:.0f} s): {clause}; stacks in {folder}, ended with code {HUNG}")
        MetricsFile(run / "metrics.jsonl").write(event)
        write_json(folder / "report.json", event | {"reason": clause})


def _say(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    record_outcome(HUNG, line)


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


class _ExitTimer:
    """A timer of the C library that calls `_exit(HUNG)` in a thread of its own: it needs no interpreter (Linux;
    elsewhere nothing happens)."""

    def __init__(self) -> None:
        self._timer = ctypes.c_void_p()
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None
        if self._library:
            function = ctypes.cast(self._library._exit, ctypes.c_void_p).value
            monotonic, in_a_thread = 1, 2
            event = _Sigevent(value=HUNG, notify=in_a_thread, function=function)
            failed = self._library.timer_create(monotonic, ctypes.byref(event), ctypes.byref(self._timer))
            assert not failed

    def set(self, seconds: float) -> None:
        if self._library:
            when = _Itimerspec(after_s=int(seconds), after_ns=int(seconds % 1 * 1e9))
            self._library.timer_settime(self._timer, 0, ctypes.byref(when), None)

    def cancel(self) -> None:
        self.set(0)
