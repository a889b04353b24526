"""Mirrors a run's metrics file to its trackers, each from a separate process, so that neither training nor another
tracker waits for one.

`python -m bifrost.trainer.monitors.tracking TRACKER RUN_DIR PID` follows `metrics.jsonl` until its parent, process PID,
signals the end of the run or is gone. Messages for the user go to standard output, one per line.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ..distributed.companion import QUIET_S, Companion, Parent, start
from ..errors import RunError, Unreachable, with_message
from .console import WithoutSecrets
from .tracker_state import read_recipe
from .trackers import TITLES, explain, has_package, named_in, open_tracker, remedy, require_installed

log = logging.getLogger(__name__)

POLL_S = 1.0  # between reads of the metrics file
LONGEST_WAIT_S = 60.0  # maximum between attempts at a failing server
DRAIN_S = 60.0  # for which the mirror of a dead run still tries to send


class Mirror:
    """Handle of the mirror processes of a run; `processes` has those that could be started, by tracker. say: prints a
    line."""

    def __init__(self, run_dir: Path, processes: dict[str, Companion], say: Callable[[str], None]):
        self.run_dir = run_dir
        self.processes = processes
        self.say = say

    def finish(self, timeout_s: float = 30.0) -> bool:
        """Signal the end of the run, wait at most `timeout_s` seconds until everything is sent; return whether it was.

        A mirror that takes longer is killed: the metrics file is complete, and `bifrost track sync` sends the rest. The
        initialisation of a store is a separate process, which continues.
        """
        for process in self.processes.values():
            process.end()
        left = self._wait(min(QUIET_S, timeout_s))
        if left and timeout_s > QUIET_S:
            self.say(f"sending the end of the run to {_titles(left)}, {timeout_s:g} s at most")
            left = self._wait(timeout_s - QUIET_S)
        for name in left:
            self.processes[name].kill()
        failed = [name for name, process in self.processes.items() if not process.succeeded]
        for name in failed:
            log.warning("%s lacks the end of this run%s", TITLES[name], remedy(name, self.run_dir))
        return bool(self.processes) and not failed

    def _wait(self, seconds: float) -> list[str]:
        """Trackers whose processes are still running after this time."""
        limit = time.monotonic() + seconds
        return [name for name, process in self.processes.items() if not process.wait(limit - time.monotonic())]


def start_mirror(run_dir: str | Path, to: Iterable[str], say: Callable[[str], None] = print) -> Mirror:
    """Start the mirrors of `run_dir` to the trackers `to` in the background, on rank 0 after `MetricsFile.rewind`.
    Never raises OSError.

    Their log is `logs/tracking.log`. say: prints the lines that matter during training.
    """
    run_dir, processes = Path(run_dir).resolve(), {}
    for name in to:
        if not has_package(name):
            say(f"no tracking, {name} is not installed: `pip install {name}`, or set tracking.enabled=false")
            continue
        try:
            output = run_dir / "logs" / "tracking.log"
            processes[name] = start(__name__, [name, str(run_dir)], output, say)
        except OSError as error:
            log.error("no tracking by %s, its process could not be started: %s", TITLES[name], error)
    return Mirror(run_dir, processes, say)


def sync(run_dir: str | Path, to: Iterable[str] = ()) -> dict[str, int]:
    """Send everything that the trackers lack, by default those of the run's recipe; return the number of points sent to
    each.

    Raises RunError if it is not a run folder, its mirror is running, or a tracker did not accept everything; the others
    have it then.
    """
    run_dir, sent, failed = Path(run_dir).resolve(), {}, []
    to = list(to) or named_in(read_recipe(run_dir))
    require_installed(to)
    for name in to:
        try:
            sent[name] = _sync(name, run_dir)
        except RunError as error:
            failed.append(error)
    if failed:
        raise failed[0] if len(failed) == 1 else with_message(failed[0], "; ".join(map(str, failed)))
    return sent


def _sync(name: str, run_dir: Path) -> int:
    target = open_tracker(name, run_dir, live=False)
    try:
        target.push(last=True)
        target.end(otherwise=None)
    except Exception as error:  # trackers, their database, the network and the disk raise many types
        reason, permanent = explain(name, error, target.server)
        kind = RunError if permanent else Unreachable
        again = "" if permanent else "; try again"
        raise kind(f"{run_dir} could not be sent to {TITLES[name]}: {reason}{again}") from error
    finally:
        target.close()
    if target.file_error:
        raise RunError(f"{target.server} has every point of {run_dir} but not its files: {target.file_error}")
    return target.sent


def _titles(names: Iterable[str]) -> str:
    return " and ".join(TITLES[name] for name in names)


def mirror(name: str, run_dir: Path, parent: Parent) -> bool:
    """Send until the run has ended and everything is sent; return False if that did not succeed in time.

    No error ends it earlier: access may be granted, or a deleted run restored, while training continues.
    """
    target, failures, deadline, place, title = None, 0, math.inf, "", TITLES[name]
    while True:
        over = parent.over  # before reading the file, so that nothing written before the end is missed
        if over:
            deadline = min(deadline, time.monotonic() + DRAIN_S)
        try:
            target = target or open_tracker(name, run_dir, live=True)
            target.push(last=over)
            if place != (place := target.address()):
                parent.tell(f"{title}: {place}")
            if over:
                target.end(otherwise="failed")
                return target.file_error is None
            if failures:
                log.info("sending to %s again after %d failed attempts", title, failures)
                parent.tell(f"{title} has everything again")
            failures = 0
        except Exception as error:  # server, network, disk: none may end the mirror
            reason, permanent = explain(name, error, target.server if target else title)
            failures += 1
            if failures == 1:
                log.error("not sent to %s, will retry: %s", title, reason)
                parent.tell(f"not sent to {title}, training continues: {reason}")
            if over and (permanent or time.monotonic() > deadline):
                log.error("gave up on %s%s", title, remedy(name, run_dir))
                return False
        parent.wait(POLL_S if over or not failures else min(2.0**failures, LONGEST_WAIT_S))


def main(arguments: list[str]) -> int:
    """Run a mirror process: tracker, run folder and parent's process id."""
    name, run_dir, pid = arguments[0], Path(arguments[1]), int(arguments[2])
    output = logging.StreamHandler()
    output.setFormatter(WithoutSecrets("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[output])
    return 0 if mirror(name, run_dir, Parent(pid)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
