"""Figures of the sources of a mixture, by hand."""

from bifrost.trainer.monitors.source_stats import SourceStats
from bifrost.trainer.optim.train_state import TrainState


def make() -> SourceStats:
    """Sources number 3 and 0 of a run, of 10 and 20 samples; a global batch of 4 on two ranks."""
    return SourceStats(["new", "old"], [3, 0], [10, 20], lambda batch: {3: 1, 0: 3} if batch % 2 else {0: 4}, scale=2.0)


def test_figures_by_hand() -> None:
    stats, progress = make(), TrainState()
    ranks = [stats.sums([0.5, 1.0], [1, 1], []), stats.sums([2.0, 0.25], [1, 1], [1])]
    stats.add(progress, [sum(each) for each in zip(*ranks, strict=True)], skipped=False)
    progress.batch += 1
    ranks = [stats.sums([3.0, 1.0], [0, 1], [0]), stats.sums([1.0, 1.0], [1, 1], [])]
    stats.add(progress, [sum(each) for each in zip(*ranks, strict=True)], skipped=False)
    progress.batch += 1
    assert stats.report(progress) == {
        "source_samples_new": 1,
        "source_epochs_new": 0.1,
        "source_loss_new": 6.0,
        "source_bad_fraction_new": 1.0,
        "source_samples_old": 7,
        "source_epochs_old": 0.35,
        "source_loss_old": 2 * (3.75 + 3) / 7,
        "source_bad_fraction_old": 1 / 7,
    }

    # The next line: a skipped step counts samples, not losses; a source without a sample has no loss.
    stats.add(progress, stats.sums([float("nan")] * 4, [1] * 4, []), skipped=True)
    later = stats.report(progress)
    assert later["source_samples_old"] == 11 and later["source_loss_old"] is None and later["source_loss_new"] is None
    assert TrainState(**vars(progress)).sources == {"0": [11, 1], "3": [1, 1]}


def test_the_samples_of_a_run_without_sources_are_those_of_the_first() -> None:
    stats, progress = make(), TrainState(step=5, samples=40)
    stats.add(progress, stats.sums([1.0] * 4, [0, 1, 1, 1], []), skipped=False)
    found = stats.report(progress)
    assert (found["source_samples_old"], found["source_samples_new"]) == (43, 1)
