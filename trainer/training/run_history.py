"""Which global batch a step of a run trained on, from its metrics file, with restarts and rollbacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...slurm.run_folder import no_run
from ..errors import RunError
from ..monitors.metrics import read_metrics


@dataclass
class Stretch:
    """The steps from one start or rollback to the next, in which batch minus step is constant."""

    step: int
    """Steps done at its beginning."""
    batch: int
    """Global batches taken at its beginning."""
    ranks: int
    micro_batch: int | None
    reached: int
    """The last step that is known to be done in it."""


@dataclass(frozen=True)
class Place:
    """A step, with its global batch, in the history of a run. `batch` counts from 1, as metrics.jsonl does."""

    step: int
    batch: int
    stretch: Stretch
    line: dict[str, Any] | None
    """The metric line of this step, if there is one."""
    digest_before: str | None
    """Data digest before the step, if known."""
    skipped: dict[str, Any] | None
    """The `skipped_step` event, if the step was skipped."""
    others: tuple[int, ...]
    """Other batches that were tried at the same step, before a rollback."""


@dataclass
class History:
    """All steps of a run."""

    stretches: list[Stretch] = field(default_factory=list)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Step -> its metric line; those of steps that a resume or a rollback dropped are not in the file."""
    skipped: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Batch -> its `skipped_step` event."""

    @classmethod
    def read(cls, run: Path) -> History:
        """RunError when `run` has no metrics."""
        if not (run / "metrics.jsonl").is_file():
            raise RunError(no_run(run, "metrics.jsonl"))
        history = cls.of(read_metrics(run / "metrics.jsonl"))
        if not history.stretches:
            raise RunError(f"{run}: metrics.jsonl contains no start of a run: it has not begun to train")
        return history

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> History:
        """From the records of a metrics file, in order."""
        history = cls()
        for record in records:
            step, event = record.get("step"), record.get("event")
            if not isinstance(step, int):
                continue
            if event == "start":
                place = record.get("batch", step), record["ranks"], record.get("micro_batch")
                history.stretches.append(Stretch(step, *place, reached=step))
                continue
            if not history.stretches:
                continue
            last = history.stretches[-1]
            last.reached = max(last.reached, step)
            if event is None:
                history.lines[step] = record
            elif event == "skipped_step":
                history.skipped[record.get("batch", step)] = record
            elif event == "rollback":
                place = record["batch"], last.ranks, last.micro_batch
                history.stretches.append(Stretch(record["to"], *place, reached=record["to"]))
        return history

    def step(self, step: int) -> Place:
        """The place of `step` in the last stretch that did it. RunError if it was not reached."""
        reached = max(each.reached for each in self.stretches)
        if not 1 <= step <= reached:
            known = f"give 1 to {reached}" if reached else "no step has been logged yet"
            raise RunError(f"step {step}: the run has reached step {reached}; {known}")
        begun = [each for each in self.stretches if each.step < step]
        if not begun:
            raise RunError(f"step {step}: metrics.jsonl has lost its beginning, it starts at {self.stretches[0].step}")
        done = [each for each in begun if step <= each.reached]
        return self._place(step, (done or begun)[-1])

    def batch(self, batch: int) -> Place:
        """The place where global batch `batch` was trained on or tried."""
        for stretch in reversed(self.stretches):
            step = stretch.step + batch - stretch.batch
            if stretch.step < step <= stretch.reached:
                return self._place(step, stretch)
        raise RunError(f"batch {batch}: no step of the run is known to have had it; see `batch` in metrics.jsonl")

    def _place(self, step: int, stretch: Stretch) -> Place:
        batch = _number(stretch, step)
        tried = {_number(each, step) for each in self.stretches if each.step < step <= each.reached}
        before = "" if step == 1 else (self._line(step - 1, batch - 1, stretch) or {}).get("data_digest")
        others = tuple(sorted(tried - {batch}))
        return Place(step, batch, stretch, self._line(step, batch), before, self.skipped.get(batch), others)

    def _line(self, step: int, batch: int, stretch: Stretch | None = None) -> dict[str, Any] | None:
        """The metric line of `step` if it had `batch`; just before `stretch`, of any batch."""
        line = self.lines.get(step)
        if line is None or (stretch and stretch.step == step):
            return line
        return line if line.get("batch", step) == batch else None


def _number(stretch: Stretch, step: int) -> int:
    return stretch.batch + step - stretch.step
