"""Counter-based draws: pinned, uniform, independent of grouping."""

import numpy as np

from bifrost.trainer.models.rng import Stream, uniform


def draws(seed: int = 0, stream: Stream = Stream.MASK_ORDER, epoch: int = 0, samples: int = 4096, lanes: int = 16):
    return uniform(seed, stream, np.full(samples, epoch), np.arange(samples), lanes)


def test_values_are_pinned() -> None:
    """A run resumed with a newer version must draw the same numbers: these never change."""
    found = uniform(7, Stream.MASK_RATE, np.array([0, 3]), np.array([0, 12345678901]), 2)
    np.testing.assert_array_equal(found, PINNED)


PINNED = np.array([[0.41446081053101563, 0.36498304558717615], [0.19265979695387753, 0.1615337738165174]])


def test_uniform_in_every_lane() -> None:
    values = draws()
    assert values.min() > 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(values.var(axis=0) - 1 / 12).max() < 0.005
    histogram = np.histogram(values, bins=64, range=(0, 1))[0]
    expected = values.size / 64
    assert ((histogram - expected) ** 2 / expected).sum() < 120  # chi-square, 63 degrees of freedom, p = 1e-5


def test_lanes_samples_epochs_seeds_and_streams_are_unrelated() -> None:
    base = draws()
    others = [draws(seed=1), draws(epoch=1), draws(stream=Stream.MASK_RATE), np.roll(base, 1, 0), np.roll(base, 1, 1)]
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.02


def test_draws_are_independent_of_the_batch() -> None:
    alone = uniform(0, Stream.MASK_ORDER, np.array([2]), np.array([17]), 8)
    together = uniform(0, Stream.MASK_ORDER, np.array([1, 2, 2]), np.array([17, 16, 17]), 8)
    assert (alone[0] == together[2]).all()
    assert (uniform(0, Stream.MASK_ORDER, np.array([2]), np.array([17]), 3)[0] == alone[0, :3]).all()
