"""Run the trials of a suite that are not done yet, one after another, each as the command that a user would type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from ...data.atomic import write_atomic
from ...data.processes import die_with_parent
from ...recipes.suite import Suite
from ...slurm.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED
from ...slurm.exit_record import newest_step
from ..distributed.stop_signals import SIGNALS
from ..errors import RunError, writing
from .trials import Trial

METRICS = "metrics.json"
SUITE = "suite.json"
COMMON = {"recipe", "settings", "score"}
"""What the trials of one folder have in common; rows, seeds and categories may be added."""


def claim(folder: Path, suite: Suite) -> None:
    """Record the suite in its folder. RunError if the folder's trials have other settings."""
    path, wanted = folder / SUITE, suite.model_dump(include=COMMON)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if other := sorted(name for name in COMMON if found.get(name) != wanted[name]):
            raise RunError(f"{folder}: its trials have another {other[0]}; name another folder with --out")
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(wanted, indent=2).encode())


def run_trials(trials: Sequence[Trial], ranks: int | None) -> int:
    """Train and evaluate what is missing; returns the exit code.

    A trial that fails is reported and left out, and the others continue. A stop signal is passed on to the training,
    which saves, and ends the suite.
    """
    failed = []
    for number, trial in enumerate(trials, 1):
        for words in missing(trial):
            print(f"[{number}/{len(trials)}] bifrost {' '.join(words)}", flush=True)
            code = _run([*words, *([f"--ranks={ranks}"] if ranks else [])])
            if code in (STOPPED, INTERRUPTED):
                return code
            if code != DONE:
                failed.append(f"{trial.question}, {trial.row}, seed {trial.seed}: exit code {code} of {words[0]}")
                break
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return FAILED if failed else DONE


def missing(trial: Trial) -> Iterable[list[str]]:
    """The commands that the trial still needs. Computed one by one: a training may be another trial's too."""
    if newest_step(trial.run) < trial.steps:
        yield trial.train
    if scores(trial) is None:
        yield trial.evaluate


def scores(trial: Trial) -> dict | None:
    """What `bifrost eval` measured of the trained weights; None if it has not."""
    try:
        found = json.loads((trial.score / METRICS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    trained = f"{trial.run.resolve()} step {trial.steps}"
    return found if trained in (found.get("mllm"), found.get("controlnet")) else None


def _run(words: list[str]) -> int:
    """Exit code of `bifrost WORDS`, run as a process that never outlives this one."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    # A session of its own: a Ctrl-C on the terminal reaches it once, through us.
    with subprocess.Popen(
        [sys.executable, "-m", "bifrost.trainer", *words],
        env=environment,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    ) as child:

        def pass_on(number: int, frame: FrameType | None) -> None:
            if child.poll() is None:
                child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        try:
            return child.wait()
        finally:
            child.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
