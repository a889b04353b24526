"""The `bifrost data` commands that need no ranks. The main command turns a DataError into one line."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .units import counted, format_bytes

app = typer.Typer(help="Make, index, check and describe shards.", no_args_is_help=True)
Shards = Annotated[list[str], typer.Argument(help="Paths, folders or URLs; braces and wildcards are expanded.")]
Out = Annotated[Path, typer.Argument(help="Folder for the shards.")]
IndexDir = Annotated[
    str | None,
    typer.Option(help="Folder or URL of the indexes, as `data.index_dir` in a recipe; default next to the shards."),
]

SHOWN_MEMBERS = 20
"""Extensions that `stats` lists: keys with dots make thousands."""


class DemoSet(str, Enum):
    scenes = "scenes"
    edits = "edits"
    drawings = "drawings"


@app.command()
def demo(
    out: Out,
    contents: Annotated[
        DemoSet,
        typer.Option(
            "--set",
            help="Scenes of up to four drawings, editing pairs of such scenes, or single drawings with their names.",
        ),
    ] = DemoSet.scenes,
) -> None:
    """Write a demo dataset of OpenMoji drawings (CC BY-SA 4.0): 6,776 scenes, 3,200 editing pairs, or about 1,900
    drawings."""
    from .demo import make_demo

    make_demo(out, contents.value)


@app.command()
def ingest(
    src: Annotated[str, typer.Argument(help="Folder of images, table of images, or WebDataset tars.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards, or s3://bucket/folder.")],
    table: Annotated[Path | None, typer.Option(help="CSV, JSONL or Parquet file naming images and captions.")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="The table's column of images, or their extension in tars.")
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            help="The table's column of captions, or their extension or .json field in tars; repeat it for several."
        ),
    ] = None,
    source_column: Annotated[
        str | None,
        typer.Option(help="The table's column of source images of editing pairs, or their extension in tars."),
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 1000,
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes; one per core by default.")] = None,
) -> None:
    """Make indexed shards from images and captions; run it again to resume after an interruption."""
    from . import ingest as module

    made = module.ingest(
        src,
        out,
        table=table,
        image_column=image_column,
        caption_column=caption_column,
        source_column=source_column,
        samples_per_shard=samples_per_shard,
        processes=processes,
    )
    read = made.samples + made.rejected
    aside = f", {made.rejected:,} set aside in {out}/rejected.jsonl" if made.rejected else ", none set aside"
    typer.echo(f"{out}: {read:,} read: {counted(made.samples, 'sample')} in {counted(made.shards, 'shard')}{aside}")
    for reason, count in module.reasons(out).most_common(5):
        typer.echo(f"  {count:,} set aside: {reason}")


@app.command()
def catalogue(shards: Shards, index_dir: IndexDir = None) -> None:
    """Write one catalogue of all shards in a folder, with which opening them needs no request per shard."""
    from .make_catalogue import make_catalogues

    for made in make_catalogues(shards, index_dir):
        typer.echo(f"{made.place.url}: {counted(len(made.names), 'shard')}, {counted(made.samples, 'sample')}")


@app.command()
def stats(shards: Shards, index_dir: IndexDir = None) -> None:
    """Show counts, sizes and caption lengths, also of further captions, from the indexes alone."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .member_counts import count_members
    from .shards import open_dataset
    from .source_images import SOURCE_TYPES

    dataset = open_dataset(shards, for_statistics=True, index_dir=index_dir)
    headers, counts = dataset.headers, count_members(dataset.shards, index_dir)
    captions = sum(header.captions for header in headers)
    sources = sum(counts[kind].samples for kind in SOURCE_TYPES if kind in counts)
    captioned = [header.caption_chars for header in headers if header.captions]
    length = "none in KEY.txt"
    if captions:
        shortest, longest = min(low for low, _, _ in captioned), max(high for _, high, _ in captioned)
        mean = sum(total for _, _, total in captioned) / captions
        length = f"{shortest:,} to {longest:,} characters, mean {mean:,.1f}"
    table = Table("", "", show_header=False)
    for name, value in (
        ("shards", f"{len(headers):,}"),
        ("samples", f"{len(dataset):,}"),
        ("samples per shard", f"{dataset.samples_per_shard.min():,} to {dataset.samples_per_shard.max():,}"),
        ("usable captions", f"{captions:,}"),
        ("caption length", length),
        *([("source images", f"{sources:,}")] if sources else []),
        ("size", format_bytes(sum(header.bytes for header in headers), 4)),
        ("mean image", f"{sum(header.image_bytes for header in headers) / len(dataset) / 1024:,.1f} KiB"),
        ("fingerprint", dataset.fingerprint[:16]),
    ):
        table.add_row(name, value)
    members = Table("next to the image", "samples", "bytes", "mean")
    for kind, count in list(counts.items())[:SHOWN_MEMBERS]:
        span = f"{count.shortest:,} to {count.longest:,}"
        members.add_row(f"KEY.{escape(kind)}", f"{count.samples:,}", span, f"{count.mean:,.1f}")
    console = Console()
    console.print(table)
    if counts:
        console.print(members)
    if len(counts) > SHOWN_MEMBERS:
        console.print(f"and {len(counts) - SHOWN_MEMBERS:,} rarer extensions")
