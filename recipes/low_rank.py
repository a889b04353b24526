"""Settings of low-rank pairs, of either stage."""

from __future__ import annotations

from pydantic import Field

from .section import Section


class LowRank(Section):
    rank: int = Field(default=16, ge=1)
    """Rank of the pairs."""
    alpha: float = Field(default=32.0, gt=0)
    """A pair's product is multiplied by alpha / rank."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
