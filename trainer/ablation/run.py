"""Run the trials of a suite that are not done yet, one after another, each as the command that a user would type."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...recipes.suite import Suite
from ...slurm.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED
from ...slurm.exit_record import newest_step
from ...slurm.io import read_json, write_json
from ..distributed.launcher import run_child
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
    if (found := read_json(path)) is not None:
        if other := sorted(name for name in COMMON if found.get(name) != wanted[name]):
            raise RunError(f"{folder}: its trials have another {other[0]}; name another folder with --out")
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def run_trials(trials: Sequence[Trial], ranks: int | None) -> int:
    """Train and evaluate what is missing; returns the exit code.

    A trial that fails is reported and left out, and the others continue. A stop signal is passed on to the training,
    which saves, and ends the suite.
    """
    failed = []
    for number, trial in enumerate(trials, 1):
        for words in missing(trial):
            print(f"[{number}/{len(trials)}] bifrost {' '.join(words)}", flush=True)
            given = [f"--ranks={ranks}"] if ranks else []
            code = run_child("bifrost.trainer", *words, *given, passed_on=SIGNALS)
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
    if (found := read_json(trial.score / METRICS)) is None:
        return None
    trained = f"{trial.run.resolve()} step {trial.steps}"
    return found if trained in (found.get("mllm"), found.get("controlnet")) else None
