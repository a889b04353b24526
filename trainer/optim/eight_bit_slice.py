"""A rank's slice of AdamW's moments of one parameter, in blocks of 8-bit codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rules import BLOCK, CHUNK, in_eight_bits

KINDS = ("exp_avg", "exp_avg_sq")


class Shared(NamedTuple):
    """A block, by its number in the slice, of which other ranks have a part; place: in what ranks exchange."""

    block: int
    place: int


@dataclass
class Slice:
    """Elements [low, low + length) of a parameter, without padding, which begin at `start` in a flat slice.

    moments: kind -> fp32 elements, or codes of a parameter in 8 bits, which has `scales`, one per block: whole blocks
    and parts of blocks.
    """

    low: int
    length: int
    start: int
    moments: dict[str, Tensor]
    scales: dict[str, Tensor]
    shared: list[Shared]

    @classmethod
    def of(cls, size: int, low: int, length: int, start: int, flat: Tensor) -> Slice:
        """With moments of zero. size: of the parameter; flat: a tensor of the device."""
        found = cls(low, length, start, {}, {}, [])
        eight = in_eight_bits(size)
        for kind in KINDS:
            found.moments[kind] = flat.new_zeros(length, dtype=torch.uint8 if eight else flat.dtype)
            if eight:
                found.scales[kind] = flat.new_zeros(-(-(low + length) // BLOCK) - low // BLOCK if length else 0)
        return found

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [*self.moments.values(), *self.scales.values()]

    def within(self, first: int, last: int) -> slice:
        """Elements of the slice that are in its blocks from `first` to `last`, which is excluded."""
        head = self.low % BLOCK
        return slice(max(0, first * BLOCK - head), min(self.length, last * BLOCK - head))

    def padding(self, first: int, last: int) -> tuple[int, int]:
        """Elements of these blocks that are other ranks', before and after its own."""
        own = self.within(first, last)
        front = max(0, self.low % BLOCK - first * BLOCK)
        return front, (last - first) * BLOCK - front - (own.stop - own.start)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First and last block, which is excluded, of what is computed at a time."""
        blocks = len(self.scales[KINDS[0]])
        for first in range(0, blocks, CHUNK // BLOCK):
            yield first, min(blocks, first + CHUNK // BLOCK)


def cut_blocks(size: int, own: int) -> list[int]:
    """Numbers of a parameter's blocks in which a rank's slice of `own` elements ends before the block does."""
    return sorted({edge // BLOCK for edge in range(own, size, own) if edge % BLOCK}) if in_eight_bits(size) else []
