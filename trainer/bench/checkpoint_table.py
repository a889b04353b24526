"""The record of `bifrost bench checkpoint` as tables."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from ...data.units import counted
from ..terminal import terminal
from .machine import format_machine

HEADS = {
    "call_s": "call, s",
    "stall_s": "stall, s",
    "save_s": "save, s",
    "load_s": "load, s",
    "cold_load_s": "cold load, s",
}


def spread(values: list[float], digits: int = 3) -> str:
    """Median, with the lowest and the highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show(record: dict[str, Any]) -> None:
    """Print seconds and ratios: the median of the rounds, with the lowest and the highest."""
    console = terminal()
    shape = f"{counted(record['ranks'], 'rank')}, {counted(record['rounds'], 'round')}"
    title = f"{record['bytes'] / 2**20:,.0f} MiB on {shape}"
    table = Table("", *HEADS.values(), "fsync", "hashes", title=title, title_justify="left")
    for name, seconds in record["seconds"].items():
        about = record["formats"][name]
        marks = ("yes" if about[key] else "no" for key in ("flushed", "verified"))
        table.add_row(name, *(spread(seconds[key]) for key in HEADS), *marks)
    console.print(table)
    ratios = Table("ratio of each round", "", title_justify="left")
    for name, values in record["ratios"].items():
        ratios.add_row(name, spread(values, 2))
    console.print(ratios)
    console.print(f"{format_machine(record['machine'])}; {record['date']}", soft_wrap=True)
