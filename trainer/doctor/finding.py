"""What a check finds, and how outside commands and file systems are asked without ever waiting for them for long."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "missing"]
COMMAND_S = 8.0
"""How long a command may take."""
CHECK_S = 10.0
"""How long all checks together may take; they run at the same time."""


class Finding(NamedTuple):
    """One row of the table."""

    what: str
    found: str
    verdict: Verdict = "ok"
    """ok, warning: works, less well or not everything; missing: needed, and not there."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


Check = Callable[[], list[Finding]]


@dataclass
class Answer:
    """What a command printed."""

    code: int
    text: str


def ask(*command: str, limit_s: float = COMMAND_S) -> Answer | str:
    """Run a command; its answer, or why there is none. One that cannot even be killed is left behind."""
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
        return "output that is not text"
    return Answer(process.returncode, text.strip())


def run_checks(checks: Sequence[tuple[str, Check]], limit_s: float = CHECK_S) -> list[Finding]:
    """The findings of all checks, in their order. One that fails or does not end is a warning under its name.

    Threads that hang in a dead file system or driver are left behind: the caller ends the process by os._exit.
    """
    results: dict[int, list[Finding]] = {}

    def work(at: int, name: str, check: Check) -> None:
        try:
            results[at] = check()
        except Exception as error:  # of a machine that is ill: the other rows still count
            line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            results[at] = [Finding(name, line, "warning", "this could not be checked")]

    threads = [
        threading.Thread(target=work, args=(at, name, check), daemon=True) for at, (name, check) in enumerate(checks)
    ]
    ends = threading.Event()
    timer = threading.Timer(limit_s, ends.set)
    timer.daemon = True
    timer.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not ends.is_set():
            thread.join(0.02)
    timer.cancel()
    late = "it hangs: look at the driver, or at the file system or server behind it"
    return [
        finding
        for at, (name, _) in enumerate(checks)
        for finding in results.get(at) or [Finding(name, f"no answer within {limit_s:g} s", "warning", late)]
    ]
