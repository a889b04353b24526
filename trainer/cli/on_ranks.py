"""Commands that run as ranks: this process is a rank or starts the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer

from ...slurm.exit_codes import DONE
from ...slurm.rank_env import idle_nodes, remove_private_folders
from ..distributed.launcher import devices, init_from_env, run_ranks
from ..distributed.stop_signals import ignore_signals
from ..errors import RunError
from ..monitors.metrics import record_interruption


def on_ranks(
    ranks: int | None,
    arguments: list[str],
    work: Callable[[], int],
    check: Callable[[int], object],
    run: Path | None = None,
    finished: Callable[[], str | None] = lambda: None,
    usual: Callable[[], int] = devices,
) -> NoReturn:
    """Do `work` if this process is a rank; otherwise start `ranks` processes with `arguments`, by default `usual()`.
    check: raises RunError for a number of ranks that cannot be used. run: folder in which the ranks save when they are
    stopped. finished: a line to print instead of starting ranks, if there is nothing left to do."""
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
    if line := finished():
        print(line)
        leave(DONE)
    ranks = ranks or usual()
    check(ranks)
    at_quit = partial(record_interruption, run / "metrics.jsonl") if run else lambda: None
    leave(run_ranks(ranks, arguments, run, at_quit))


def leave(code: int) -> NoReturn:
    raise typer.Exit(code)


def is_rank(context: typer.Context, ranks: int | None, usual: Callable[[], int] = devices) -> bool:
    """Whether this process is a rank. If it is not, and `ranks`, by default `usual()`, are several, they are started
    with the same command, and it ends with their exit code."""
    if init_from_env(ranks):
        return True
    if (count := ranks or usual()) > 1:
        leave(run_ranks(count, _rank_arguments(context)))
    return False


def _rank_arguments(context: typer.Context) -> list[str]:
    """The arguments of a command for its ranks, without `ranks`."""
    arguments, last = _words(context), []
    for parameter in context.command.params:
        value = context.params[str(parameter.name)]
        if parameter.param_type_name == "argument":
            last = ["--", *(value or [])]
        elif parameter.name != "ranks" and value is not None and value is not False:
            plain = value.value if isinstance(value, Enum) else value
            arguments.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={plain}")
    return arguments + last


def _words(context: Any) -> list[str]:
    """The words of a command after the program's own, such as `data index`."""
    return [] if context.parent is None else [*_words(context.parent), str(context.info_name)]
