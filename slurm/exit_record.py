"""Records in the run folder that the batch script reads: attempts, exit reason of the last one, newest checkpoint.

`slurm/attempts.jsonl` has one object per attempt and one per decision; `slurm/exit_record.json` is the
exit reason of the first rank to record one; `stopped.json` has the reason why a run is not restarted.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.local import names_in
from .io import newest_records, read_json, write_json

ATTEMPTS = "slurm/attempts.jsonl"
OUTCOME = "slurm/exit_record.json"
STOPPED = "stopped.json"
OLD_ATTEMPTS, OLD_OUTCOME = "slurm/starts.jsonl", "slurm/outcome.json"
"""Names of these two files in earlier versions, in which `attempt` was `start`."""
TIMED_LINES = 100_000
"""Newest lines of metrics.jsonl from which the time for a stop is estimated: more than lie between two saves."""
GRACE_S, LEAST_GRACE_S = 120, 60
"""Default until a step and a save were timed, and the minimum: Slurm's timer may fire a minute early."""


def attempt_id() -> str:
    """Id of the attempt that this process belongs to: job id and restart count."""
    return f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def record_outcome(code: int, reason: str, host: str | None = None) -> None:
    """Record this rank's exit reason in the run folder BIFROST_RUN; the first writer wins.

    host: the suspect node, if any. When one rank fails, srun ends the others and returns their exit code, so that
    srun's own code does not identify the cause.
    """
    run = os.environ.get("BIFROST_RUN")
    if not run:
        return
    try:
        file = os.open(Path(run) / OUTCOME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError:  # another rank was first, or the folder is not writable
        return
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    with os.fdopen(file, "w") as out:
        json.dump({"attempt": attempt_id(), "rank": rank, "code": code, "reason": reason, "host": host}, out)


def read_outcome(run: Path) -> dict[str, Any] | None:
    """The exit reason that a rank of this attempt recorded, None without one."""
    try:
        found = read_json(run / OUTCOME) or read_json(run / OLD_OUTCOME)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and _attempt(found) == attempt_id() else None


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints, in order. Storage errors are retried, then DataLost: a run whose folder cannot be read
    has not lost its checkpoints."""
    try:
        names = names_in(run / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    return sorted(int(step) for step in steps if step.isdigit())


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none. Errors as of `steps_saved`."""
    return max(steps_saved(run), default=0)


def append(run: Path, record: Mapping[str, Any]) -> None:
    """Append a record to the run's attempts."""
    with open(run / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "attempt": attempt_id(), **record}) + "\n")


def attempts(run: Path, since: float = 0.0) -> list[dict[str, Any]]:
    """Attempts since that Unix time, oldest first: step, nodes and, if the attempt recorded its end, code, decision and
    reason."""
    found: dict[str, dict[str, Any]] = {}
    for record in [*_lines(run / OLD_ATTEMPTS), *_lines(run / ATTEMPTS)]:
        if record.get("time", 0.0) >= since:
            attempt = _attempt(record)
            found.setdefault(attempt, {}).update(record | {"attempt": attempt})
    return list(found.values())


def _attempt(record: Mapping[str, Any]) -> str:
    return record.get("attempt", record.get("start", ""))


def restarts_without_progress(history: Iterable[Mapping[str, Any]], step: int) -> int:
    """Number of consecutive attempts up to the newest that started at `step`, without those that excluded a node."""
    count = 0
    for record in reversed(list(history)):
        if record.get("step") != step:
            break
        count += not record.get("excluded")
    return count


def write_stopped(run: Path, code: int, reason: str) -> None:
    """Record why the run is not restarted."""
    write_json(run / STOPPED, {"time": time.time(), "attempt": attempt_id(), "code": code, "reason": reason})


def grace(run: Path) -> int:
    """Seconds that all ranks need to stop, from the run's measurements (see `stop_s`), else a default."""
    validations: list[float] = []
    steps: list[float] = []
    saves: list[float] = []
    for line in islice(newest_records(run / "metrics.jsonl"), TIMED_LINES):
        save = line.get("event") == "checkpoint"
        for found, most, value in (
            (validations, 10, line.get("validation_s")),
            (steps, 100, line.get("step_s")),
            (saves, 10, line.get("seconds") if save else None),
        ):
            if isinstance(value, float) and len(found) < most:
                found.append(value)
        if (len(validations), len(steps), len(saves)) == (10, 100, 10):
            break
    return round(stop_s(statistics.median(steps) if steps else None, saves, max(validations, default=0.0)) or GRACE_S)


def stop_s(step_s: float | None, saves: Sequence[float], between_s: float = 0.0) -> float | None:
    """Seconds to reserve for a stop: twice the sum of one step, the longest save and `between_s`, the longest work
    between two steps, such as a validation; None before step and save were timed."""
    return None if step_s is None or not saves else max(LEAST_GRACE_S, 2 * (step_s + max(saves) + between_s))


def last_metrics(run: Path) -> dict[str, Any] | None:
    """The newest metrics record of the run."""
    return next((line for line in newest_records(run / "metrics.jsonl") if "event" not in line), None)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
