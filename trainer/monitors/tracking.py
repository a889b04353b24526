"""Mirrors a run's metrics file to MLflow from a separate process, so that training never waits for the server.

`python -m bifrost.trainer.monitors.tracking RUN_DIR PID` follows `metrics.jsonl` until its parent, process PID, signals
the end of the run or is gone. Messages for the user go to standard output, one per line.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import RunError, Unreachable
from .console import WithoutSecrets
from .mlflow_errors import explain
from .mlflow_run import MlflowRun

log = logging.getLogger(__name__)

POLL_S = 1.0  # between reads of the metrics file
LONGEST_WAIT_S = 60.0  # maximum between attempts at a failing server
DRAIN_S = 60.0  # for which the mirror of a dead run still tries to send
QUIET_S = 2.0  # for which the end of a run waits without a message


class Mirror:
    """Handle of a mirror process; `process` is None if it could not be started. say: prints a line."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[bytes] | None, say: Callable[[str], None]):
        self.run_dir = run_dir
        self.process = process
        self.say = say
        if process is not None:
            threading.Thread(target=self._listen, name="tracking", daemon=True).start()

    def finish(self, timeout_s: float = 30.0) -> bool:
        """Signal the end of the run, wait at most `timeout_s` seconds until everything is sent; return whether it was.

        A mirror that takes longer is killed: the metrics file is complete, and `bifrost track sync` sends the rest. The
        initialisation of a store is a separate process, which continues.
        """
        process = self.process
        if process is None:
            return False
        assert process.stdin is not None
        with suppress(OSError):  # it ended before
            process.stdin.write(b"end")
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(QUIET_S, timeout_s))
        if process.returncode is None and timeout_s > QUIET_S:
            self.say(f"sending the end of the run to MLflow, {timeout_s:g} s at most")
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s - QUIET_S)
        if process.returncode is None:
            process.kill()
            process.wait()
        if process.returncode:
            log.warning("MLflow lacks the end of this run; `bifrost track sync %s` sends it", self.run_dir)
        return process.returncode == 0

    def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            self.say(line.decode(errors="replace").rstrip())


def start_mirror(run_dir: str | Path, say: Callable[[str], None] = print) -> Mirror:
    """Start the mirror of `run_dir` in the background, on rank 0 after `MetricsFile.rewind`. Never raises OSError.

    Its log is `logs/tracking.log`. say: prints the lines that matter during training.
    """
    if importlib.util.find_spec("mlflow") is None:
        say("no tracking, mlflow is not installed: `pip install mlflow`, or set tracking.enabled=false")
        return Mirror(Path(run_dir), None, say)
    run_dir = Path(run_dir).resolve()
    command = [sys.executable, "-m", __name__, str(run_dir), str(os.getpid())]
    try:
        (run_dir / "logs").mkdir(exist_ok=True)
        with open(run_dir / "logs" / "tracking.log", "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                start_new_session=True,
            )
    except OSError as error:
        log.error("no tracking, its process could not be started: %s", error)
        return Mirror(run_dir, None, say)
    return Mirror(run_dir, process, say)


def sync(run_dir: str | Path) -> int:
    """Send everything that the server lacks; return the number of points sent.

    Raises RunError if it is not a run folder, its mirror is running, or the server did not accept everything.
    """
    target = MlflowRun(Path(run_dir).resolve(), live=False)
    try:
        target.push(last=True)
        target.end(otherwise=None)
    except Exception as error:  # MLflow, its database, the network and the disk raise many types
        reason, permanent = explain(error, target.server)
        kind = RunError if permanent else Unreachable
        raise kind(f"{run_dir} could not be sent to MLflow: {reason}{'' if permanent else '; try again'}") from error
    if target.file_error:
        raise RunError(f"{target.server} has every point of {run_dir} but not its files: {target.file_error}")
    return target.sent


class _Parent:
    """State of the training process, by the pipe on standard input and the parent's process id."""

    def __init__(self, pid: int):
        self.pid = pid
        self.over = False

    def wait(self, seconds: float) -> None:
        """Sleep, at most until the end of the run."""
        if self.over:
            time.sleep(seconds)
        elif select.select([0], [], [], seconds)[0]:
            os.read(0, 16)
            self.over = True
        elif os.getppid() != self.pid:  # killed, while a forked child of it still holds the pipe
            self.over = True


def mirror(run_dir: Path, parent: _Parent, say: Callable[[str], None]) -> bool:
    """Send until the run has ended and everything is sent; return False if that did not succeed in time.

    No error ends it earlier: access may be granted, or a deleted run restored, while training continues.
    """
    target, failures, deadline, place = None, 0, math.inf, ""
    while True:
        over = parent.over  # before reading the file, so that nothing written before the end is missed
        if over:
            deadline = min(deadline, time.monotonic() + DRAIN_S)
        try:
            target = target or MlflowRun(run_dir, live=True)
            target.push(last=over)
            if place != (place := target.address()):
                say(f"MLflow: {place}")
            if over:
                target.end(otherwise="FAILED")
                return target.file_error is None
            if failures:
                log.info("sending again after %d failed attempts", failures)
                say("MLflow has everything again")
            failures = 0
        except Exception as error:  # server, network, disk: none may end the mirror
            reason, permanent = explain(error, target.server if target else "MLflow")
            failures += 1
            if failures == 1:
                log.error("not sent, will retry: %s", reason)
                say(f"not sent to MLflow, training continues: {reason}")
            if over and (permanent or time.monotonic() > deadline):
                log.error("gave up: `bifrost track sync %s` sends the rest", run_dir)
                return False
        parent.wait(POLL_S if over or not failures else min(2.0**failures, LONGEST_WAIT_S))


def _to_parent(line: str) -> None:
    with suppress(OSError):  # it is gone
        print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Run the mirror process: run folder and parent's process id."""
    run_dir, pid = Path(arguments[0]), int(arguments[1])
    # Slurm signals every process of a job, but only the training process decides when the run ends.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    output = logging.StreamHandler()
    output.setFormatter(WithoutSecrets("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[output])
    return 0 if mirror(run_dir, _Parent(pid), _to_parent) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
