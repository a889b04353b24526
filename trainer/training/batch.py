"""Division of the global batch over the ranks of a run."""

from __future__ import annotations

from ...recipes import BatchSplit
from ..errors import RunError


def split_batch(global_batch: int, micro_batch: int, ranks: int, hpz: int | None) -> BatchSplit:
    """The batch on `ranks` ranks; RunError when it does not divide over them, or they not over nodes of `hpz` ranks."""
    if hpz and ranks > hpz and ranks % hpz:
        raise RunError(f"zero.hpz={hpz} needs a multiple of {hpz} ranks, got {ranks}; set zero.hpz=null")
    try:
        return BatchSplit(global_batch, micro_batch, ranks)
    except ValueError as error:
        raise RunError(str(error)) from None
