"""Mask rate and order: MAR's truncated normal, exact counts, independent of how samples are grouped."""

import numpy as np
import torch

from bifrost.recipes.branch import MaskRate
from bifrost.trainer.models.masking import draw_masks, hidden_counts
from bifrost.trainer.models.rng import Stream, uniform

MAR = {"mean": 1.0, "std": 0.25, "low": 0.7, "high": 1.0}


def counts(samples: int, tokens: int = 256, **rule: float) -> np.ndarray:
    index = np.arange(samples)
    rate = MaskRate.model_construct(**{**MAR, **rule})  # also rates that a recipe refuses
    return hidden_counts(rate, 0, np.zeros(samples, dtype=np.int64), index, tokens)


def test_rates_follow_the_truncated_normal() -> None:
    """Against rejection sampling with numpy's own normal."""
    normal = np.random.default_rng(0).normal(1.0, 0.25, 4_000_000)
    wanted = np.ceil(normal[(normal >= 0.7) & (normal <= 1.0)] * 256)
    found = counts(400_000)
    assert found.min() == 180  # ceil(0.7 * 256)
    assert found.max() == 256
    assert abs(found.mean() - wanted.mean()) < 0.15
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.quantile(found, quantile) - np.quantile(wanted, quantile)) <= 1
    # Spec 3: a mean rate of 0.867 before rounding up.
    assert abs(found.mean() / 256 - 0.867) < 0.003


def test_counts_are_those_of_torchs_normal() -> None:
    """As earlier versions drew them: a run resumes with the same masks."""
    index = np.arange(20_000)
    share = torch.from_numpy(uniform(0, Stream.MASK_RATE, np.zeros_like(index), index, 1)[:, 0])
    for rule in (MAR, {"mean": 0.5, "std": 0.1, "low": 0.1, "high": 0.9}, {**MAR, "std": 0.01}):
        ends = torch.tensor([rule["low"], rule["high"]], dtype=torch.float64)
        floor, ceiling = torch.special.ndtr((ends - rule["mean"]) / rule["std"])
        rate = rule["mean"] + rule["std"] * torch.special.ndtri(floor + share * (ceiling - floor))
        wanted = np.ceil(rate.clamp(rule["low"], rule["high"]).numpy() * 256 - 1e-9)
        assert (counts(20_000, **rule) == wanted).all()


def test_bounds_are_exact() -> None:
    assert (counts(1000, tokens=10, low=0.7, high=0.7) == 7).all()
    assert (counts(1000, tokens=16, low=1.0, high=1.0) == 16).all()
    assert (counts(1000, tokens=16, low=0.0, high=0.0) == 0).all()
    assert (counts(1000, tokens=10, low=0.7, high=0.7, std=0.001) == 7).all()  # 300 standard deviations from the mean
    assert (counts(1000, tokens=10, low=1.0, high=1.0, mean=0.5, std=0.001) == 10).all()


def test_masks_hide_exactly_the_counts() -> None:
    index = np.arange(500)
    wanted = counts(500, tokens=16)
    masks = draw_masks(0, np.zeros(500, dtype=np.int64), index, wanted, 16)
    assert (masks.sum(axis=1) == wanted).all()


def test_every_patch_is_hidden_alike() -> None:
    index = np.arange(20_000)
    masks = draw_masks(3, np.zeros(20_000, dtype=np.int64), index, np.full(20_000, 12), 16)
    assert np.abs(masks.mean(axis=0) - 0.75).max() < 0.015
    pairs = (masks[:, :, None] & masks[:, None, :]).mean(axis=0)[np.triu_indices(16, 1)]
    assert np.abs(pairs - 12 * 11 / (16 * 15)).max() < 0.015


def test_draws_depend_on_the_sample() -> None:
    """A sample has the same mask in any grouping and order, and another mask for another epoch or seed."""
    index = np.arange(64)
    epoch = np.zeros(64, dtype=np.int64)
    whole = draw_masks(0, epoch, index, np.full(64, 8), 16)
    shuffled = np.random.default_rng(0).permutation(64)
    assert (draw_masks(0, epoch, index[shuffled], np.full(64, 8), 16) == whole[shuffled]).all()
    for other in (draw_masks(0, epoch + 1, index, np.full(64, 8), 16), draw_masks(1, epoch, index, np.full(64, 8), 16)):
        assert (other != whole).any(axis=1).mean() > 0.9


def test_further_draws_are_independent_and_change_no_earlier_one() -> None:
    epoch, index = np.full(4000, 2, dtype=np.int64), np.arange(4000)
    counts = hidden_counts(MaskRate(), 5, epoch, index, 16, 3).reshape(-1, 3)
    masks = draw_masks(5, epoch, index, counts.ravel(), 16).reshape(-1, 3, 16)
    assert (masks.sum(2) == counts).all()
    for draws in (1, 2):
        fewer = hidden_counts(MaskRate(), 5, epoch, index, 16, draws)
        assert (fewer.reshape(-1, draws) == counts[:, :draws]).all()
        assert (draw_masks(5, epoch, index, fewer, 16).reshape(-1, draws, 16) == masks[:, :draws]).all()
    assert np.abs(np.corrcoef(counts.T) - np.eye(3)).max() < 0.05
    seen = (masks - masks.mean(0)).reshape(4000, 48)
    assert np.abs(np.corrcoef(seen.T) - np.eye(48))[:16, 16:].max() < 0.08
