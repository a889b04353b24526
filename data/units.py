"""How counts, bytes and seconds are printed."""

from __future__ import annotations


def counted(number: int, noun: str, ending: str = "s") -> str:
    """`1 shard`, `2,000 shards`; `ending` makes the plural."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def format_bytes(size: float, digits: int) -> str:
    """`size` bytes with `digits` significant ones, in the largest unit of 1024 that it fills."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{digits}g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.{digits}g} TiB"


def format_seconds(seconds: float) -> str:
    """`3 d 4 h`, `2 h 05 min`, `3 min 20 s`, `12 s`, `4.2 s`."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole if whole >= 10 else round(seconds, 1):g} s"
