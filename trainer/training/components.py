"""What the loop of a run works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from ...data import Batch
from ...recipes import Recipe
from ..checkpoint.manager import CheckpointManager
from ..distributed.process_group import Ranks
from ..distributed.stop_signals import StopSignals
from ..monitors.console import Console
from ..monitors.goodput import AccountedMetrics
from ..monitors.phase_timer import PhaseTimer
from ..monitors.rank_stats import RankStats
from ..monitors.tracking import Mirror
from ..monitors.utilisation import Utilisation
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..optim.train_state import Progress
from ..stages import Stage


@dataclass
class TrainerComponents:
    """Everything that the loop calls, and what is closed after it."""

    recipe: Recipe
    stage: Stage
    ranks: Ranks
    progress: Progress
    engine: Engine
    ema: Ema | None
    batches: Callable[[Progress], Iterator[Batch]]
    """This rank's micro-batches from where the run stands to its end."""
    normalizer: Callable[[int], float]
    """Number of a global batch, from 0 -> what its backward passes divide the summed loss by."""
    save: Callable[[Progress], None]
    """Begins to save; `saver` says when, and when it is done."""
    saver: CheckpointManager
    recover: Callable[[Progress], None]
    """Called after too many skipped steps in a row: goes back to a checkpoint, or raises Unhealthy."""
    metrics: AccountedMetrics
    console: Console
    stop: StopSignals
    phases: PhaseTimer
    rank_stats: RankStats
    utilisation: Utilisation
    after_step: Callable[[Progress], None]
    """Called at the end of every step, on every rank."""
    loaders: ExitStack
    mirror: Mirror | None
