"""The objects that the training loop uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from ...data import BadSamples, Batch
from ...recipes import BatchSplit
from ...recipes.schema import Health
from ..checkpoint.manager import CheckpointManager
from ..distributed.companion import Companion
from ..distributed.process_group import Ranks
from ..distributed.stop_signals import StopSignals
from ..monitors.console import Console
from ..monitors.goodput import AccountedMetrics
from ..monitors.phase_timer import PhaseTimer
from ..monitors.rank_stats import RankStats
from ..monitors.source_stats import SourceStats
from ..monitors.tracking import Mirror
from ..monitors.truncation import TruncationNotice
from ..monitors.utilisation import Utilisation
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..optim.train_state import TrainState
from ..stages import Stage
from .base_loss import BaseLoss
from .validation import Validator


@dataclass
class TrainerComponents:
    """Everything that the loop calls, and what is closed at its end."""

    steps: int
    """Last step of the run."""
    log_every: int
    batch: BatchSplit
    health: Health
    learning_rate: Callable[[int], float]
    """Step, from 0 -> its learning rate."""
    bad_samples: BadSamples
    stage: Stage
    sources: SourceStats | None
    """Of a mixture; None with one data set."""
    ranks: Ranks
    progress: TrainState
    engine: Engine
    ema: Ema | None
    batches: Callable[[TrainState], Iterator[Batch]]
    """This rank's micro-batches from the given progress to the end of the run."""
    normalizer: Callable[[int], float]
    """Index of a global batch, from 0 -> divisor of the summed loss in its backward passes."""
    save: Callable[[TrainState], None]
    """Starts a save; `saver` decides when one is due and when it is complete."""
    saver: CheckpointManager
    validator: Validator | None
    base_loss: BaseLoss | None
    """Of the understanding sources; None without any."""
    patience: int | None
    """Consecutive validations without a lower loss after which the run ends."""
    recover: Callable[[TrainState], None]
    """Called after too many skipped steps in a row: rolls back to a checkpoint, or raises Unhealthy."""
    metrics: AccountedMetrics
    console: Console
    stop: StopSignals
    phases: PhaseTimer
    rank_stats: RankStats
    truncation: TruncationNotice
    utilisation: Utilisation
    after_step: Callable[[TrainState], None]
    """Called at the end of every step, on every rank."""
    loaders: ExitStack
    mirror: Mirror | None
    uploads: Companion | None
