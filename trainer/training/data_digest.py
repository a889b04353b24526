"""Proof of what was trained on: a chain of digests over the samples really read, the same for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

VERSION = "2"
"""Of the digests: `2:` stands before those over shard and key. Older ones, without a mark, are over keys alone, which
the tars of a data set may share; `1+2:` stands before those of a run that was begun with such."""


class SequenceDigest:
    """A step's digest covers its set of samples and the digest before it, so equal digests mean equal histories.

    Within a step the samples' names are summed, not listed: each rank adds its own and one all-reduce gives the whole.
    """

    def __init__(self, value: str = "") -> None:
        self.value = value

    @staticmethod
    def fingerprint(names: Iterable[str]) -> tuple[float, float]:
        """Sums of the two 32-bit halves of each name's hash (see `Dataset.name`): exact in fp64 up to two million
        samples per step."""
        low = high = 0
        for name in names:
            word = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            low, high = low + (word & 0xFFFFFFFF), high + (word >> 32)
        return float(low), float(high)

    def advance(self, low: float, high: float) -> str:
        """The digest after a step whose fingerprints sum to (low, high) over all ranks. It continues one of any
        version, which stays the proof of what came before."""
        mark = VERSION if not self.value or version(self.value) == VERSION else f"1+{VERSION}"
        found = hashlib.sha256(f"{self.value} {int(low)} {int(high)}".encode()).hexdigest()[:16]
        self.value = f"{mark}:{found}"
        return self.value


def version(digest: str) -> str:
    """`1`, `2`, or `1+2` for a run that was begun with the one and continued with the other."""
    return digest.partition(":")[0] if ":" in digest else "1"


def comparable(one: str | None, other: str | None) -> bool:
    """Whether it means something that two digests are equal or differ."""
    if not one or not other:
        return False
    return one == other or (version(one) == version(other) and "+" not in version(one))
