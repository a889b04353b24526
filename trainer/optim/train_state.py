"""The training state of a run besides its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Stored in a checkpoint's JSON. Every field has a default, so that older checkpoints load."""

    step: int = 0
    """Steps done, skipped ones included."""
    samples: int = 0
    """Samples consumed in all."""
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    """Length of the current streak of skipped steps."""
    digest: str = ""
    """Chain over every sample consumed so far; see `SequenceDigest`."""
    batch: int = -1
    """Global batches taken from the sample sequence: steps, plus those that rollbacks have skipped."""
    spikes_in_a_row: int = 0
    """Steps of `bad_in_a_row` whose loss and gradient norm were finite."""
    accepted: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that were not skipped, oldest first; see `Health`."""
    rollbacks: int = 0
    """Number of rollbacks to a checkpoint and of baseline resets."""
    rolled_back_to: int = -1
    """Step of the checkpoint of the last rollback."""

    best_loss: float | None = None
    """Lowest held-out loss so far: of the EMA weights if there are any."""
    best_step: int = -1
    """Step of `best_loss`."""
    validations_since_best: int = 0

    sources: dict[str, list[int]] = field(default_factory=dict)
    """With several sources: number of each -> samples consumed, and unreadable ones among them."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            self.batch = self.step

    def load(self, other: TrainState) -> None:
        """Replace every field by that of `other`."""
        vars(self).update(vars(other))

    def validated(self, loss: float) -> None:
        """Record the held-out loss of this step; one that is not finite is never the best."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.validations_since_best = loss, self.step, 0
        else:
            self.validations_since_best += 1

    def done(self, steps: int, patience: int | None) -> bool:
        """Whether no step is left: all are done, or that many validations in a row were not the best."""
        return self.step >= steps or (patience is not None and self.validations_since_best >= patience)
