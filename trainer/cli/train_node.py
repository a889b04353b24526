"""`bifrost train-node`: the ranks of one node, as the manifests of clusters without Slurm start them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...recipes import load_recipe
from ...slurm.errors import SlurmError
from ...slurm.exit_codes import DONE, STOPPED, USAGE
from ...slurm.nodes import Node, join_nodes
from ..distributed.launcher import init_from_env, run_ranks
from ..training.batch import split_batch
from ..training.setting_changes import check_fixed, finished_line
from .on_ranks import leave
from .options import RecipeArgument


def train_node(
    recipe: RecipeArgument,
    ranks: Annotated[int, typer.Option(help="Ranks of each node.", min=1)],
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)],
    node: Annotated[int, typer.Option(help="This node, from 0.", min=0)],
    master: Annotated[str, typer.Option(help="HOST:PORT of node 0.")],
    since: Annotated[float, typer.Option(help="Unix time from which attempts without progress count.")] = 0.0,
    again: Annotated[int, typer.Option(help="Exit code of a retryable attempt.")] = STOPPED,
) -> None:
    """Run one node's ranks of a run. Exit code 0: all steps are done; 2: not retryable; `again`: retryable."""
    from ...slurm.node_attempt import begin, end

    settings = load_recipe(recipe)
    run, values = Path(settings.runs_dir) / settings.name, settings.model_dump(mode="json")
    init_from_env(ranks)  # without the variables of the cluster's own launcher
    os.environ["BIFROST_RUN"] = str(run)
    # The first process of a container ignores signals that it does not handle.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(again))
    if line := finished_line(run, values):
        print(line)
        leave(DONE)
    check_fixed(run, values)
    split_batch(settings.global_batch, settings.micro_batch, ranks * nodes, settings.zero.hpz)
    place, attempt = _place(node, nodes, master), None

    def start() -> None:
        nonlocal attempt
        attempt = begin(run, nodes, since)

    join_nodes(place, start)
    ended = end(run, run_ranks(ranks, ["train", recipe], run, node=place), attempt)
    if ended.code != DONE:
        print(f"bifrost: {ended.reason}: {'not ' if ended.final else ''}retryable", file=sys.stderr, flush=True)
    leave(DONE if ended.code == DONE else USAGE if ended.final else again)


def _place(rank: int, count: int, master: str) -> Node:
    """This node; SlurmError for options that contradict each other."""
    address, _, port = master.rpartition(":")
    if not address or not port.isdigit() or not 0 < int(port) < 2**16:
        raise SlurmError(f"--master {master}: give HOST:PORT of node 0")
    if rank >= count:
        raise SlurmError(f"--node {rank} of {count} nodes: want 0 to {count - 1}")
    return Node(rank, count, address, int(port))
