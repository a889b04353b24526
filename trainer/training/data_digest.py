"""The data digest: a hash chain over the samples that were trained on, the same for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

VERSION = "2"
"""Version prefix: `2:` marks digests over shard and key. Older digests, without a prefix, cover only keys, which tars
of a data set may share; `1+2:` marks digests of a run that began with version 1."""


class SequenceDigest:
    """A step's digest covers its set of samples and the previous digest, so equal digests mean equal histories.

    Within a step the hashes of the samples' names are summed: each rank adds its own, and one all-reduce adds the
    ranks'.
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
        """The digest after a step whose fingerprints sum to (low, high) over all ranks. It continues a
        digest of any version, which still covers the earlier steps."""
        mark = VERSION if not self.value or version(self.value) == VERSION else f"1+{VERSION}"
        found = hashlib.sha256(f"{self.value} {int(low)} {int(high)}".encode()).hexdigest()[:16]
        self.value = f"{mark}:{found}"
        return self.value


def version(digest: str) -> str:
    """`1`, `2`, or `1+2` for a run that began with version 1 and continued with version 2."""
    return digest.partition(":")[0] if ":" in digest else "1"


def comparable(one: str | None, other: str | None) -> bool:
    """Whether two digests can be compared: both exist, and have the same version."""
    if not one or not other:
        return False
    return one == other or (version(one) == version(other) and "+" not in version(one))
