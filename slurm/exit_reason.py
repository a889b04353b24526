"""Why the ranks of an attempt ended, and whether the run may be started again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import NamedTuple

from . import exit_record
from .exit_codes import BAD_NODE, DONE, FAILED, HUNG, LOCKED, LOST, STOPPED, USAGE

REASONS = {
    FAILED: "exit code 1 of unknown cause",
    USAGE: "exit code 2, a setting to fix",
    LOST: "storage failed, or a loader's worker was killed",
    STOPPED: "stopped by a signal, saved",
    HUNG: "ended by the watchdog",
    BAD_NODE: "bad nodes",
    LOCKED: "another process owns the run",
    128 + signal.SIGKILL: "a rank was ended by SIGKILL, possibly out of memory",
}


class ExitReason(NamedTuple):
    code: int
    reason: str
    host: str | None
    """The suspect node, if any."""
    final: bool
    """The run is complete, or another attempt would end in the same way."""


def read_reason(run: Path, code: int) -> ExitReason:
    """Why an attempt ended whose ranks returned `code`: as its first failed rank recorded, else the code's meaning."""
    outcome = exit_record.read_outcome(run)
    reason, host = REASONS.get(code) or _signal(code) or f"exit code {code}", None
    if outcome:
        code, reason, host, named = outcome["code"], outcome["reason"], outcome.get("host"), f"rank {outcome['rank']}: "
        reason = reason if reason.startswith(named) else named + reason
    final = code in (DONE, USAGE, LOCKED) or (outcome is not None and code == FAILED)
    return ExitReason(code, reason, host, final)


def _signal(code: int) -> str | None:
    try:
        return f"a rank was ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return None
