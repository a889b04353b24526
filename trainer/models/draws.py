"""Random draws on the device of a tensor: `rng`'s numbers, computed where they are used, and normal ones from them.

Noise for every channel of every token is too much to draw in the loader workers and to copy: they hand over the states
of the samples' streams, 8 bytes each.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of `rng`, as the int64 that has their bits."""


def uniform_lanes(states: Tensor, lanes: Tensor) -> Tensor:
    """Lane n, from 0, of streams in `states` (`rng.states` as int64): equal to those of `rng.uniform` to the bit.

    Both int64, of shapes that broadcast; fp64 in (0, 1).
    """
    bits = _mix(states + (lanes + 1) * _GOLDEN)
    return (_shift(bits, 11).double() + 0.5) * 2.0**-53


def gaussian(uniform: Tensor) -> Tensor:
    """Standard normal draws from uniform ones in (0, 1), of any shape; fp32."""
    return torch.special.ndtri(uniform.double()).float()


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
