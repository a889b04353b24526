"""Commands that run as ranks: this process is a rank or starts the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from ...recipes import Recipe
from ...slurm.exit_codes import DONE
from ...slurm.rank_env import idle_nodes, remove_private_folders
from ..distributed.launcher import devices, init_from_env, run_ranks
from ..distributed.stop_signals import ignore_signals
from ..errors import RunError
from ..training.batch import split_batch
from ..training.setting_changes import finished


def on_ranks(
    recipe: Recipe,
    ranks: int | None,
    arguments: list[str],
    work: Callable[[], int],
    trains: bool = False,
    usual: Callable[[], int] = devices,
) -> NoReturn:
    """Do `work` if this process is a rank; otherwise start `ranks` processes with `arguments`, by default `usual()`.
    trains: whether ranks save when they are stopped."""
    if init_from_env(ranks):
        code = work()
        ignore_signals()
        if code == DONE:
            remove_private_folders(os.environ)
        leave(code)
    if ranks is None and (idle := idle_nodes(os.environ)):
        raise RunError(
            f"this Slurm job has {idle + 1} nodes, and bifrost was started on only one of them: put `srun"
            " --ntasks-per-node=N` before it (N: GPUs per node), or give --ranks to use only this machine"
        )
    run = Path(recipe.runs_dir) / recipe.name
    if trains and (steps := finished(run, recipe.model_dump(mode="json"))):
        early = steps < recipe.steps
        more = "more patience continues" if early else "more steps continue"
        example = f"validation.patience={2 * (recipe.validation.patience or 1)}" if early else f"steps={2 * steps}"
        print(f"{recipe.name} is finished: {steps} steps in {run}; {more} it, such as {example}")
        leave(DONE)
    ranks = ranks or usual()
    split_batch(recipe.global_batch, recipe.micro_batch, ranks, recipe.zero.hpz)
    leave(run_ranks(ranks, arguments, run if trains else None))


def leave(code: int) -> NoReturn:
    raise typer.Exit(code)
