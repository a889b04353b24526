"""Proof of what was trained on: a chain of digests over the samples really read, the same for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


class SequenceDigest:
    """A step's digest covers its set of sample keys and the digest before it, so equal digests mean equal histories.

    Within a step the keys are summed, not listed: each rank adds its own and one all-reduce gives the whole.
    """

    def __init__(self, value: str = "") -> None:
        self.value = value

    @staticmethod
    def fingerprint(keys: Iterable[str]) -> tuple[float, float]:
        """Sums of the two 32-bit halves of each key's hash: exact in fp64 up to two million keys a step."""
        low = high = 0
        for key in keys:
            word = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
            low, high = low + (word & 0xFFFFFFFF), high + (word >> 32)
        return float(low), float(high)

    def advance(self, low: float, high: float) -> str:
        """The digest after a step whose fingerprints sum to (low, high) over all ranks."""
        self.value = hashlib.sha256(f"{self.value} {int(low)} {int(high)}".encode()).hexdigest()[:16]
        return self.value
