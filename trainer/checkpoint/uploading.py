"""Copies a run's checkpoints to `checkpoint.upload` from a process of its own, so that training never waits for it.

`python -m bifrost.trainer.checkpoint.uploading RUN ADDRESS KEEP PID` copies the newest checkpoint that has no copy,
until its parent, process PID, signals the end of the run or is gone. Its log is `logs/upload.log`.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ...data.errors import DataError
from ...data.units import format_bytes
from ...slurm.held import hold
from ..distributed.companion import QUIET_S, Companion, Parent, start
from ..errors import RunError
from .copies import Copies

log = logging.getLogger(__name__)

POLL_S = 2.0  # between looks at the run's checkpoints
LONGEST_WAIT_S = 300.0  # between attempts at storage that fails
LAST_ATTEMPTS = 3  # after the run has ended; 1 if the storage failed before
LAST_S = 1800.0
"""Seconds for which a finished run waits for the copy of its last checkpoint."""
HELD = Path("copies", "held")
"""In the run folder: links to the files of the checkpoint that is being copied."""


def claim(run: Path, address: str) -> str | None:
    """Check before training that checkpoints can be copied; a note if the storage does not answer. RunError and
    DataError as `Copies.claim`."""
    try:
        Copies(run, address).claim()
    except DataError as error:
        if not error.transient:
            raise
        return f"checkpoint.upload: {error}; training continues, and tries again"
    return None


def start_uploads(run: Path, address: str, keep: int, say: Callable[[str], None]) -> Companion | None:
    """Start the process, on rank 0; None, with a line, if that fails. say: prints the lines that matter."""
    run = run.resolve()
    try:
        return start(__name__, [str(run), address, str(keep)], run / "logs" / "upload.log", say)
    except OSError as error:
        say(f"checkpoints are not copied to {address}, the process could not be started: {error}")
        return None


def finish_uploads(uploads: Companion, run: Path, finished: bool) -> None:
    """End the process; after a `finished` run, wait for the copy of its last checkpoint. Another attempt copies it
    otherwise."""
    uploads.end()
    if finished and not uploads.wait(QUIET_S):
        uploads.say(f"waiting for the copy of the last checkpoint, {LAST_S / 60:g} min at most; Ctrl-C ends this")
    if not uploads.wait(LAST_S if finished else 0.0):
        uploads.kill()
    if finished and not uploads.succeeded:
        uploads.say(f"the last checkpoint is not copied; `bifrost checkpoint upload {run}` copies it")


def follow(copies: Copies, parent: Parent) -> bool:
    """Copy until the run has ended and its newest checkpoint is copied; False if that did not succeed."""
    failures, left = 0, LAST_ATTEMPTS
    done: dict[int, str] | None = None
    damaged: dict[int, str] = {}
    while True:
        over = parent.over  # before looking, so that the last checkpoint is not missed
        try:
            here = copies.there()
            if here != done:
                missing = [step for step in copies.missing(here) if damaged.get(step) != here[step]]
                if over:  # older ones are for the next attempt, or for `bifrost checkpoint upload`
                    missing = [step for step in missing if step == max(here)]
                if missing:
                    if not _copy(copies, missing[-1], parent):
                        damaged[missing[-1]] = here[missing[-1]]
                    failures = 0
                    continue
                done = here
            failures = 0
            if over:
                return not here or damaged.get(max(here)) != here[max(here)]
        except Exception as error:  # storage and network: none may end this
            failures += 1
            log.exception("attempt %d failed", failures)
            if failures == 1:
                parent.tell(f"not copied to {copies.place}, training continues: {error}")
            permanent = isinstance(error, RunError) or (isinstance(error, DataError) and not error.transient)
            left -= over * (1 if failures <= LAST_ATTEMPTS else LAST_ATTEMPTS)
            if over and (permanent or left <= 0):
                return False
        parent.wait(min(POLL_S * 2**failures, LONGEST_WAIT_S) if failures and not over else POLL_S)


def _copy(copies: Copies, step: int, parent: Parent) -> bool:
    """Copy the checkpoint of `step`, unless it has been pruned; False if it is damaged."""
    held = copies.run / HELD
    shutil.rmtree(held, ignore_errors=True)  # of an interrupted copy
    if not hold(copies.store.folder(step), held):
        return True
    try:
        begun = time.monotonic()
        sent = copies.copy(step, held)
        seconds = time.monotonic() - begun
        parent.tell(f"checkpoint of step {step} copied to {copies.place}: {format_bytes(sent, 3)} in {seconds:.0f} s")
        return True
    except RunError as error:
        log.error("%s", error)
        parent.tell(str(error))
        return False
    finally:
        shutil.rmtree(held, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run the process: run folder, address, copies to keep, and the parent's process id."""
    run, address, keep, pid = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return 0 if follow(Copies(Path(run), address, int(keep)), Parent(int(pid))) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
