"""Random draws that depend on the sample only, not on rank, world size, worker or number of resumes.

Every number is a hash of (seed, stream, epoch, sample, lane) by SplitMix64's finaliser (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Stream(IntEnum):
    """Purpose of a draw; streams are independent."""

    MASK_RATE = 1
    MASK_ORDER = 2
    CAPTION_DROPOUT = 3
    NOISE_LEVEL = 4
    NOISE = 5
    POSTERIOR = 6
    CAPTION_EXCHANGE = 7
    PREDICTED_LATENTS = 8
    LATENT_NOISE = 9
    LATENT_NOISE_LEVEL = 10
    CAPTION = 11


def states(seed: int, stream: Stream, epoch: IntArray, index: IntArray) -> npt.NDArray[np.uint64]:
    """The states [B] from which `uniform` computes its lanes."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) + np.uint64(stream) * _GOLDEN)
        state = _mix(state ^ (epoch.astype(np.uint64) * _GOLDEN))
        return _mix(state ^ (index.astype(np.uint64) * _GOLDEN))


def uniform(seed: int, stream: Stream, epoch: IntArray, index: IntArray, lanes: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in (0, 1), [B, lanes], for samples `index` [B] of epochs `epoch` [B]; 53 random bits each."""
    with np.errstate(over="ignore"):
        state = states(seed, stream, epoch, index)
        bits = _mix(state[:, None] + np.arange(1, lanes + 1, dtype=np.uint64) * _GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def chosen(
    seed: int, stream: Stream, epoch: IntArray, index: IntArray, share: float | npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Bool [B]: each sample is chosen with probability `share`, of all or of each [B]."""
    return uniform(seed, stream, epoch, index, 1)[:, 0] < share


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    value = np.asarray(value, dtype=np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
