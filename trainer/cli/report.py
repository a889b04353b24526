"""`bifrost report` and `bifrost compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...data.atomic import write_atomic
from ..errors import RunError, writing


def report(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/mllm-7b.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Output file; default report.html in RUN.", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page on RUN: curves, attempts, failures, previews, settings, environment."""
    from ..report.files import open_run
    from ..report.page import page

    write(out or run / "report.html", page(open_run(run)))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write an HTML page, with curves.", show_default=False)] = None,
) -> None:
    """Compare RUNs: settings, environment, losses at the same steps, previews, speed, memory."""
    from ..report.compare import CURVES, page, read, tables
    from ..report.compare import compare as compared
    from ..report.files import is_run, open_run
    from ..report.summary import Summary

    # `runs/*` also names the store of MLflow; a path that does not exist is a typing error.
    others = [path for path in runs if path.exists() and not is_run(path)]
    if len(runs) - len(others) >= 2:
        for path in others:
            print(f"{path}: not a run folder, left out", file=sys.stderr)
        runs = [path for path in runs if path not in others]
    if len(runs) < 2:
        raise RunError("bifrost compare: give two run folders or more")
    names = [folder.resolve().name for folder in runs]
    shown = names if len(set(names)) == len(names) else [str(folder) for folder in runs]
    drawn = tuple(CURVES) if out else ("loss",)
    opened = [open_run(folder, name, Summary(drawn, compared=True)) for folder, name in zip(runs, shown, strict=True)]
    lines = read(opened)
    found = compared(opened, lines)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(tables(found))
    if out:
        write(out, page(opened, lines, found), quiet=as_json)


def show(tables: dict[str, tuple[list[str], list[list[str]]]]) -> None:
    from rich.table import Table

    from ..terminal import terminal

    console = terminal()
    for title, (heads, rows) in tables.items():
        if not rows:
            console.print(f"{title}: none")
            continue
        table = Table(*heads, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write(file: Path, text: str, quiet: bool = False) -> None:
    """Write the page to `file` atomically. Raises RunError."""
    with writing(file):
        write_atomic(file, text.encode(errors="backslashreplace"))  # names of files that are not UTF-8
    if not quiet:
        print(file)
