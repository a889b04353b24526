"""`bifrost replay`: a rebuilt batch as a table, JSON and a contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.captions import CAPTION_TYPE
from ...data.progress import progress
from ...data.units import counted
from ...slurm.io import write_json
from ..errors import RunError, writing
from ..io import write_png
from ..terminal import terminal
from ..training.run_history import History

if TYPE_CHECKING:
    from ..training.replay import Replay

RECORD, SHEET = "batch.json", "contact_sheet.png"
SHOWN = 64
"""Samples in the table and on the sheet, those with the highest loss."""


def replay(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="The step, as metrics.jsonl counts.", min=1)] = None,
    batch: Annotated[
        int | None, typer.Option(help="A global batch instead, for one that a rollback skipped.", min=1)
    ] = None,
    weights_step: Annotated[
        int | None, typer.Option(help="Use the checkpoint of this step; 0: the initial weights.", min=0)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default replay/ in the run folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all samples as JSON, no table.")] = False,
) -> None:
    """Rebuild a step's batch in one process: keys, captions, images, draws, and each sample's loss."""
    if (step is None) == (batch is None):
        raise RunError("give either --step or --batch")
    history = History.read(run)
    place = history.step(step) if step is not None else history.batch(batch or 0)

    from ..training.replay import replay as rebuild

    with progress("rebuilding the step"):
        found = rebuild(run, place, weights_step)
    out = out or run / "replay" / f"step-{place.step:08d}-batch-{place.batch:08d}"
    record, sheet = found.record(), found.sheet(SHOWN)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RECORD, record)
        write_png(out / SHEET, sheet)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        _print(found, out)


def _print(found: Replay, out: Path) -> None:
    from rich.table import Table

    console = terminal()
    place = found.place
    lines = [
        f"step {place.step}, global batch {place.batch}: {counted(len(found.samples), 'sample')}, loss {found.loss:.6g}"
    ]
    if place.line and place.line["loss"] is not None:
        lines[0] += f", logged {place.line['loss']:.6g}"
    lines.append(
        f"weights of step {found.weights}"
        + (", the step's own" if found.exact else f": no checkpoint is of step {place.step - 1}, so losses differ")
    )
    if place.skipped:
        lines.append(f"it was skipped: {place.skipped['reason']}")
    if place.others:
        lines.append(f"before a rollback the step was also tried with --batch {' and '.join(map(str, place.others))}")
    lines += [f"{key} could not be read and was replaced by a neighbour: {reason}" for key, reason in found.replaced]
    for line in lines:
        console.print(line, soft_wrap=True)
    drawn = [name for name in found.samples[0] if name.startswith(("mask_rate", "noise_level"))]
    named = ["source"] if "source" in found.samples[0] else []
    chosen = any(item.caption_member != CAPTION_TYPE for item in found.items)
    names = [name.replace("_", " ") for name in drawn]
    table = Table("loss", *named, "key", *names, *(["member"] if chosen else []), "caption")
    order = found.highest_loss(SHOWN)
    for sample in (found.samples[i] for i in order):
        change = next((name for name in ("dropped", "exchanged") if sample.get(f"caption_{name}")), None)
        caption = f"({change}) {sample['caption']}" if change else sample["caption"]
        if sample.get("task"):
            caption = f"({sample['task']}) {caption}"
        if sample.get("latents_predicted"):
            caption = f"(predicted latents) {caption}"
        cells = [*(sample[name] for name in named), sample["key"], *(f"{sample[name]:.3f}" for name in drawn)]
        cells += [sample["caption_member"]] if chosen else []
        table.add_row(f"{sample['loss']:.4g}", *cells, caption)
    console.print(table)
    if len(order) < len(found.samples):
        console.print(f"and {len(found.samples) - len(order)} with lower losses, in {RECORD}")
    console.print(f"{out / RECORD} and {SHEET}", soft_wrap=True)
