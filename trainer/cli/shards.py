"""`bifrost data index` and `verify`: shards whose bytes ranks divide among themselves."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from ...data import DataError
from ...data.cli import IndexDir, Shards
from ...data.units import counted
from ..distributed.gather import Gather, single_process
from .on_ranks import is_rank, leave

if TYPE_CHECKING:
    from ...data.write import Indexed

SLOWEST = timedelta(days=1)
"""For how long the ranks wait for the one with the largest share; one that ends is noticed at once."""
RanksOption = Annotated[int | None, typer.Option(help="Processes on this machine that divide the shards.", min=1)]


def index(
    context: typer.Context,
    shards: Shards,
    only_missing: Annotated[bool, typer.Option("--only-missing", help="Skip shards that have an index.")] = False,
    index_dir: IndexDir = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="Index texts without images, for sources with task=understanding.")
    ] = False,
    ranks: RanksOption = None,
) -> None:
    """Index existing WebDataset tars, which are not changed; remote ones are read once, in parts."""
    from ...data.write import index_all

    rank, gather = _join(context, ranks)
    found = index_all(shards, only_missing, index_dir, rank, gather, texts)
    if rank == 0:
        _show(found)
    if found.problems:
        raise DataError("\n".join(found.problems))


def _show(found: Indexed) -> None:
    headers = [header for _, header in found.done]
    samples, captions = (sum(getattr(header, name) for header in headers) for name in ("samples", "captions"))
    left_out = found.left_out.total()
    read = f"{samples + left_out:,} read, {left_out:,} of them without a sample" if left_out else f"{samples:,} read"
    indexed = f"{counted(len(headers), 'shard')} indexed: {counted(samples, 'sample')}"
    typer.echo(f"{indexed}, {captions:,} of them with a caption ({read})")
    for reason, count in found.left_out.most_common(5):
        typer.echo(f"  {count:,} left out: {reason}")
    if empty := sum(not header.samples for header in headers):
        typer.echo(f"  {counted(empty, 'shard')} without samples")
    if found.problems:
        typer.echo(f"  {counted(len(found.problems), 'shard')} could not be indexed")


def verify(context: typer.Context, shards: Shards, index_dir: IndexDir = None, ranks: RanksOption = None) -> None:
    """Read every shard and compare it with its index; exit code 1 on a mismatch."""
    from ...data.write import verify_all

    rank, gather = _join(context, ranks)
    found = verify_all(shards, index_dir, rank, gather)
    if rank == 0:
        for problem in found.problems:
            typer.echo(problem)
        typer.echo(f"{counted(found.checked, 'shard')} checked, {len(found.problems):,} with problems")
    leave(1 if found.problems else 0)


def _join(context: typer.Context, ranks: int | None) -> tuple[int, Gather]:
    """The number of this rank, and the gather of all; of a single process without a launcher or `ranks`. If `ranks`
    are to be started, they are, and this process ends with their exit code."""
    if not is_rank(context, ranks, usual=lambda: 1):
        return 0, single_process
    from ..distributed.process_group import join

    joined = join(SLOWEST, cpu=True)
    return joined.rank, joined.gather
