"""Recovery after too many skipped steps in a row: roll back to the last good checkpoint and skip the bad samples.

Skipped steps do not change the weights. Repeating the good steps since the checkpoint would give the same weights, to
the bit; so their samples are skipped together with the bad ones, as in PaLM's runs (Chowdhery et al. 2022, section
5.1). After a rollback both weights and data differ. If the loss is finite but still high, it is the new baseline, and
the run does not roll back again.

Nothing is written before the new state is complete. A run that is killed here, or before its next checkpoint, resumes
from the remaining checkpoint, reads the same samples and takes the same decision.
"""

from __future__ import annotations

import logging
import sys
import time

from ...recipes.schema import Health as Settings
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.state import reload
from ..distributed.process_group import Ranks
from ..errors import Unhealthy
from ..monitors.console import Console
from ..monitors.goodput import AccountedMetrics
from ..optim.ema import Ema
from ..optim.engine import Engine
from ..optim.train_state import TrainState

log = logging.getLogger(__name__)


class Recovery:
    """The loop's `recover`: sets engine, EMA and progress to where the run continues. Every rank calls it."""

    def __init__(
        self,
        settings: Settings,
        saver: CheckpointManager,
        engine: Engine,
        ema: Ema | None,
        ranks: Ranks,
        metrics: AccountedMetrics,
        console: Console,
    ) -> None:
        self.settings = settings
        self.saver = saver
        self.engine = engine
        self.ema = ema
        self.ranks = ranks
        self.metrics = metrics
        self.console = console

    def __call__(self, progress: TrainState) -> None:
        """Roll back, or reset the baseline. Unhealthy, with the reason, when neither can help."""
        streak = progress.bad_in_a_row
        good = progress.step - streak
        trouble = f"step {progress.step}: {streak} steps in a row were skipped for a bad loss or gradient norm"
        remedy = "see the `skipped_step` events in metrics.jsonl, `bifrost replay`, and lower optimizer.lr"
        if progress.rollbacks >= self.settings.max_rollbacks:
            limit = f"health.max_rollbacks={self.settings.max_rollbacks} is reached"
            raise Unhealthy(f"{trouble}, and {limit}: {remedy}")
        spikes = progress.spikes_in_a_row == streak
        if spikes and progress.rolled_back_to == good:
            return self._reset_baseline(progress, "still high after a rollback, with other samples")
        self.saver.wait()
        reader = self.saver.store.newest_verified(
            range(good + 1, sys.maxsize), self.ranks.rank, self.ranks.size, self.ranks.gather
        )
        if reader is not None:
            return self._roll_back(progress, reader)
        if spikes:
            return self._reset_baseline(progress, "high for long, with no checkpoint to roll back to")
        raise Unhealthy(f"{trouble}, and no checkpoint is from before them: {remedy}")

    def _roll_back(self, progress: TrainState, reader: CheckpointReader) -> None:
        reload(self.engine, self.ema, reader)
        there = TrainState(**reader.state["progress"])
        first, there.batch = there.batch + 1, progress.batch
        there.bad_in_a_row = there.spikes_in_a_row = 0
        there.rollbacks, there.rolled_back_to = progress.rollbacks + 1, there.step
        # Checkpoints saved in between are obsolete; a later save of the same step must not find them.
        self.saver.store.remove_after(there.step, self.ranks.rank, self.ranks.gather)
        if self.saver.local:
            self.saver.local.clear()
        past: dict[str, float] = {}
        try:
            past = self.metrics.resume(there.step, time.time(), None)
        except OSError as error:  # the file still reads correctly: later lines of a step replace earlier ones
            log.error("%s still holds the lines of discarded steps: %s", self.metrics.path, error.strerror)
        event = {"event": "rollback", "step": progress.step, "to": there.step, "batch": there.batch}
        self.metrics.write({**event, "skipped_batches": [first, progress.batch], "rollbacks": there.rollbacks, **past})
        self.console.say(
            f"{progress.bad_in_a_row} steps in a row were skipped up to step {progress.step}: back to the checkpoint of"
            f" step {there.step}, passing over global batches {first} to {progress.batch}"
        )
        progress.load(there)

    def _reset_baseline(self, progress: TrainState, why: str) -> None:
        self.metrics.write({"event": "baseline_reset", "step": progress.step, "rollbacks": progress.rollbacks + 1})
        self.console.say(f"up to step {progress.step} loss or gradient norm are {why}: this is the new baseline")
        progress.accepted = []
        progress.bad_in_a_row = progress.spikes_in_a_row = 0
        progress.rollbacks += 1
