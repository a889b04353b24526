"""One rank of a run, in three steps: open, build, fit."""

from __future__ import annotations

from collections.abc import Callable

from ...data import worker_failure
from ...data.units import counted
from ...recipes import Recipe
from ...slurm.exit_codes import DONE, STOPPED
from ..checkpoint.uploading import finish_uploads
from ..distributed.stop_signals import ENDING
from ..models.kernel_selection import make_deterministic
from ..optim.train_state import TrainState
from . import loop
from .build import build
from .components import TrainerComponents
from .run_context import RunContext, open_run


def train(recipe: Recipe, after_step: Callable[[TrainState], None] = lambda progress: None) -> int:
    """Train or continue the run that `recipe` names, as one of its ranks. Returns the exit code.

    after_step: called at the end of every step, on every rank.

    RunError and DataError are raised on every rank alike; nothing of an earlier run is overwritten before all checks
    have passed.
    """
    if recipe.kernels.deterministic:
        make_deterministic()
    with open_run(recipe) as run:
        parts = build(run, after_step)
        return fit(run, parts)


def fit(run: RunContext, parts: TrainerComponents) -> int:
    """Train to the recipe's last step or to a stop signal. Returns the exit code."""
    progress, outcome = parts.progress, "failed"
    try:
        finished = loop.run(parts, progress)
        outcome = "finished" if finished else "stopped"
    except Exception as error:
        parts.saver.abandon(timeout_s=60)
        raise worker_failure(error, run.ranks.rank) or error from error
    finally:
        _close(run, parts, outcome)
    parts.console.say(
        f"done: {counted(progress.step, 'step')}{_early(run, progress)}, {counted(progress.samples, 'sample')},"
        f" run folder {run.folder}"
        if finished
        else f"stopped by {run.stop.asked() or 'another rank'} at step {progress.step}, saved;"
        f" the same command or `bifrost resume {run.folder}` continues it"
    )
    # srun ends all ranks as soon as one exits with a code other than 0: no rank exits before all are ready.
    run.ranks.barrier()
    return DONE if finished else STOPPED


def _early(run: RunContext, progress: TrainState) -> str:
    """Why a finished run has fewer steps than its recipe."""
    if progress.step >= run.recipe.steps:
        return ""
    return f" of {run.recipe.steps} (val_loss is lowest at step {progress.best_step}, {progress.best_loss:.4g})"


def _close(run: RunContext, parts: TrainerComponents, outcome: str) -> None:
    """Close loaders, console, metrics and the mirror of a run. outcome: `finished`, `stopped` or `failed`."""
    if outcome != "failed":
        run.stop.phase = ENDING
        if run.ranks.first:
            run.stop.announce()
    parts.loaders.close()
    if parts.base_loss is not None:
        parts.base_loss.close()
    parts.console.close()
    parts.metrics.write({"event": "end", "step": parts.progress.step, "outcome": outcome})
    if run.ranks.first:
        parts.metrics.store()
    if parts.uploads is not None:
        with run.stop.waiting():
            finish_uploads(parts.uploads, run.folder, outcome == "finished")
    if parts.mirror is not None:
        with run.stop.waiting():
            parts.mirror.finish(timeout_s=60 if outcome == "finished" else 5)
