"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """What a checkpoint's JSON holds beside the tensors. Every field has a default, so that older checkpoints load."""

    step: int = 0
    """Steps done, skipped ones included."""
    samples: int = 0
    """Samples consumed in all."""
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    """Steps skipped up to now without one that was not."""
    digest: str = ""
    """Chain over every sample consumed so far; see `SequenceDigest`."""
    batch: int = -1
    """Global batches taken from the sequence of samples: the step, and what rollbacks have passed over."""
    spikes_in_a_row: int = 0
    """Those of `bad_in_a_row` whose numbers were finite."""
    accepted: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that were not skipped, oldest first; see `Health`."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint, or took a new level for normal."""
    rolled_back_to: int = -1
    """The step that the last rollback went to."""

    def __post_init__(self) -> None:
        if self.batch < 0:
            self.batch = self.step

    def become(self, other: Progress) -> None:
        """Stand where `other` stands."""
        vars(self).update(vars(other))
