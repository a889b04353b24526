"""Ends a hung run: dumps the stacks of all ranks, names the suspect rank, and exits with a retryable code.

A thread on every rank watches its `PhaseTimer`. Training is in lockstep, so all ranks stall within a step; each dumps
its stacks to the run folder, and the lowest responsive rank writes the report. Two OS timers back up the thread in case
the interpreter is blocked.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from ...recipes.schema import Watchdog as Settings
from ...slurm.exit_codes import HUNG
from ...slurm.rank_env import host_name
from ..distributed.exit_timer import ExitTimer
from ..distributed.process_group import Ranks
from .hang import HangReport, exit_timeout_s, report_exit
from .phase_timer import PhaseTimer

POLL_S = 1.0
FLOOR_S, STEPS = 100.0, 20
"""Automatic timeout: STEPS times the median step, but at least FLOOR_S seconds."""


class Watchdog:
    """Watches `phases` inside a `with` block of the training thread."""

    def __init__(self, settings: Settings, phases: PhaseTimer) -> None:
        self.settings = settings
        self.phases = phases
        self._training = threading.get_ident()
        self._folder: Path | None = None
        self._file: TextIO | None = None
        self._hosts: Sequence[str] = ()
        self._rank = int(os.environ.get("RANK", "0"))
        self._over = threading.Event()
        self._exit = ExitTimer(HUNG)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.phases.on_steady_state = self._set_timers
        self._thread.start()
        return self

    def attach(self, ranks: Ranks, folder: Path) -> Sequence[str]:
        """Called on all ranks once they have joined and own the run: statuses then go to `folder/stacks/START`.
        Returns the hosts of all ranks."""
        statuses = ranks.gather((host_name(), time.strftime("%Y%m%d-%H%M%S", time.gmtime())))
        hosts, starts = zip(*statuses, strict=True)
        place = folder / "stacks" / starts[0]
        place.mkdir(parents=True, exist_ok=True)
        # Opened in advance: the OS timer that writes to it cannot open files.
        self._file = open(place / f"rank-{ranks.rank:05d}.txt", "w")  # noqa: SIM115
        self._rank, self._hosts, self._folder = ranks.rank, hosts, place
        return hosts

    def __exit__(self, *_: object) -> None:
        """Stop watching, and remove empty stack files."""
        self._over.set()
        self._thread.join()
        self.remove_empty_stacks()

    def remove_empty_stacks(self) -> None:
        """Remove this rank's empty stacks file."""
        if self._folder and self._file:
            self._file.close()
            with suppress(OSError):
                (self._folder / f"rank-{self._rank:05d}.txt").unlink()
                self._folder.rmdir()
                self._folder.parent.rmdir()
                self._folder.parents[1].rmdir()

    def bound_s(self) -> float:
        """Timeout of the current step in seconds."""
        settings, usual = self.settings, self.phases.median_step()
        step = settings.step_timeout_s or (max(FLOOR_S, STEPS * usual) if usual else settings.startup_timeout_s)
        return {"start": settings.startup_timeout_s, "long": settings.save_timeout_s, "step": step}[
            self.phases.timeout_class
        ]

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            silent, bound = time.monotonic() - self.phases.last_step, self.bound_s()
            if silent > bound or (silent > bound / 2 and self._asked()):
                self._end(silent, bound)
            self._set_timers()
        self.phases.on_steady_state = lambda: None
        faulthandler.cancel_dump_traceback_later()
        self._exit.cancel()

    def _set_timers(self) -> None:
        """Postpone the OS timers, which fire only if this thread no longer does so. After a long timeout ends, the
        training thread also calls this, so that they do not keep the long timeout until the next poll."""
        rest = max(0.0, self.bound_s() - (time.monotonic() - self.phases.last_step))
        faulthandler.dump_traceback_later(rest + 2 * POLL_S, file=self._file or sys.stderr)
        self._exit.set(rest + exit_timeout_s(len(self._hosts)))

    def _asked(self) -> bool:
        """Whether another rank has timed out; checked only when this one is waiting too."""
        with suppress(OSError):
            return self._folder is not None and (self._folder / "asked").exists()
        return False

    def _end(self, silent: float, bound: float) -> None:
        self._exit.set(exit_timeout_s(len(self._hosts)))
        if self._folder is None or self._file is None:
            faulthandler.dump_traceback(sys.stderr)
            report_exit(f"no step for {silent:.0f} s (bound {bound:.0f} s), before the rendezvous; stacks above")
        else:
            try:
                (self._folder / "asked").touch()
                HangReport(
                    rank=self._rank,
                    hosts=self._hosts,
                    folder=self._folder,
                    phases=self.phases,
                    training=self._training,
                    stacks=self._file,
                    stalled_s=silent,
                    bound_s=bound,
                ).collect_and_report()
            except OSError as error:
                faulthandler.dump_traceback(sys.stderr)
                report_exit(
                    f"rank {self._rank} hangs and {self._folder} cannot be written ({error.strerror}); stacks above"
                )
        os._exit(HUNG)
