"""Samples, epochs, loss and unreadable samples of each source of a mixture, exact over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..optim.train_state import TrainState


class SourceStats:
    """names, numbers, sizes: of the sources, in the order of the dataset: name, number in the run, samples. taken:
    index of a global batch -> number of a source -> its samples in the batch. scale: factor from a sample's share of
    the summed loss to its own loss."""

    def __init__(
        self,
        names: Sequence[str],
        numbers: Sequence[int],
        sizes: Sequence[int],
        taken: Callable[[int], dict[int, int]],
        scale: float,
    ) -> None:
        self.names, self.numbers, self.sizes = names, numbers, sizes
        self._taken, self._scale = taken, scale
        self.reset()

    def reset(self) -> None:
        """Forget the losses since the last line."""
        self._losses = [0.0] * len(self.names)
        self._counts = [0] * len(self.names)

    def sums(self, losses: Sequence[float], sources: Sequence[int], unreadable: Sequence[int]) -> list[float]:
        """This rank's sums of a step, to be added up over the ranks, [2 n]: of the losses of each of the n sources, and
        of its unreadable samples. losses, sources: of each sample. unreadable: source of each of these."""
        found = [0.0] * (2 * len(self.names))
        for loss, source in zip(losses, sources, strict=True):
            found[source] += loss
        for source in unreadable:
            found[len(self.names) + source] += 1
        return found

    def add(self, progress: TrainState, totals: Sequence[float], skipped: bool) -> None:
        """Count a step in `progress`, before its batch and samples are. totals: `sums` over all ranks. skipped:
        without an update; its losses, which may not be finite, are left out."""
        if not progress.sources:  # the first source of a run that began without others has all its samples
            progress.sources = {"0": [progress.samples, 0]}
        taken = self._taken(progress.batch)
        for place, number in enumerate(self.numbers):
            count = taken.get(number, 0)
            seen = progress.sources.setdefault(str(number), [0, 0])
            seen[0] += count
            seen[1] += int(totals[len(self.names) + place])
            if not skipped:
                self._losses[place] += totals[place] * self._scale
                self._counts[place] += count

    def report(self, progress: TrainState) -> dict[str, float | None]:
        """Metrics of every source: samples, epochs and fraction of unreadable samples in the whole run, and the mean
        loss since the last call, None without a sample."""
        found: dict[str, float | None] = {}
        for place, (name, number, size) in enumerate(zip(self.names, self.numbers, self.sizes, strict=True)):
            samples, unreadable = progress.sources.get(str(number), (0, 0))
            count = self._counts[place]
            found[f"source_samples_{name}"] = samples
            found[f"source_epochs_{name}"] = samples / size
            found[f"source_loss_{name}"] = self._losses[place] / count if count else None
            found[f"source_bad_fraction_{name}"] = unreadable / samples if samples else 0.0
        self.reset()
        return found
