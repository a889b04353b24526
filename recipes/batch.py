"""Division of the global batch over ranks and backward passes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """A global batch on `ranks` ranks. Raises ValueError, with the remedy, when it does not divide evenly."""

    global_batch: int
    """Samples per step."""
    micro_batch: int
    """Samples per rank and backward pass."""
    ranks: int

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.ranks) == 0:
            return
        fits = [b for b in range(1, self.global_batch + 1) if self.global_batch % (b * self.ranks) == 0]
        near = min(fits, key=lambda b: abs(b - self.micro_batch), default=None)
        multiple = -(-self.global_batch // self.ranks) * self.ranks
        fewer = max(ranks for ranks in range(1, self.ranks + 1) if self.global_batch % ranks == 0)
        use = f"{fewer} ranks" if fewer > 1 else "1 rank"
        remedy = f"micro_batch={near}" if near else f"global_batch={multiple}, or use {use}"
        raise ValueError(
            f"global_batch {self.global_batch} does not divide by micro_batch x ranks,"
            f" {self.micro_batch} x {self.ranks}: set {remedy}"
        )

    @property
    def passes(self) -> int:
        """Backward passes per step on each rank."""
        return self.global_batch // (self.micro_batch * self.ranks)
