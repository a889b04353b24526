"""Findings of checks, and running checks and external commands with time limits."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "missing"]
COMMAND_S = 8.0
"""Time limit of a command."""
CHECK_S = 10.0
"""Time limit of all checks, which run concurrently."""


class Finding(NamedTuple):
    """One row of the table."""

    what: str
    found: str
    verdict: Verdict = "ok"
    """`warning`: training works, but not everything or more slowly; `missing`: training cannot run."""
    remedy: str = ""
    """What to do; empty if nothing."""


Check = Callable[[], list[Finding]]


@dataclass
class Answer:
    """Exit code and output of a command."""

    code: int
    text: str


def ask(*command: str, limit_s: float = COMMAND_S) -> Answer | str:
    """Run a command; its answer, or why there is none. A process that cannot be killed is abandoned."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        return "not found"
    except OSError as error:
        return error.strerror or str(error)
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"no answer within {limit_s:g} s"
    except UnicodeDecodeError:
        return "its output is not text"
    return Answer(process.returncode, text.strip())


def run_checks(checks: Sequence[tuple[str, Check]], limit_s: float = CHECK_S) -> list[Finding]:
    """Findings of all checks, in order; a check that fails or hangs gives a warning under its name.

    Threads that hang in a file system or driver are abandoned: the caller must exit by os._exit.
    """
    results: dict[int, list[Finding]] = {}

    def work(at: int, name: str, check: Check) -> None:
        try:
            results[at] = check()
        except Exception as error:  # of a faulty machine: the other checks still count
            line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            results[at] = [Finding(name, line, "warning", "could not be checked")]

    threads = [
        threading.Thread(target=work, args=(at, name, check), daemon=True) for at, (name, check) in enumerate(checks)
    ]
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "it hangs: check the driver, file system or server that it uses"
    return [
        finding
        for at, (name, _) in enumerate(checks)
        for finding in results.get(at) or [Finding(name, f"no answer within {limit_s:g} s", "warning", late)]
    ]
