"""Whether the shards of an earlier ingest attempt are still as it made them: by sizes and hashes, not by content.

The report of a shard is written last. It states the shard's size and hash and the size of its index, so that a check
costs two small reads per shard.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .atomic import write_atomic
from .errors import DataError, DataLost
from .index import Header, index_path, load_header
from .local import stat_of, with_retries


def save_report(path: Path, shard: Path, header: Header, rejected: list[tuple[str, str]]) -> None:
    """Record that `shard` and its index are complete, with what they left out."""
    index = stat_of(index_path(str(shard)))
    report = {
        "samples": header.samples,
        "rejected": rejected,
        "bytes": header.bytes,
        "sha256": header.sha256,
        "index_bytes": index.st_size if index else 0,
    }
    with_retries(lambda: write_atomic(path, json.dumps(report).encode()), path)


def load_report(path: Path) -> dict[str, Any] | None:
    """The report of a shard; None when there is none, or it is damaged."""
    try:
        report = json.loads(with_retries(path.read_bytes, path))
        return report if report.keys() >= {"samples", "rejected"} else None
    except DataLost:
        raise
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def is_finished(shard: Path, path: Path) -> bool:
    """Whether `shard` has a report, at `path`, and it and its index still fit it; otherwise the shard has to be made.

    Prints a line for a shard that was finished and is now missing or truncated, or has no usable index. Raises
    DataError when another shard took its place, which is not overwritten.
    """
    report = load_report(path)
    if report is None:
        return False
    if report.get("unused_captions"):
        raise DataError(
            f"{shard}: made by an earlier version, with only the first caption of each list; name a new folder for the"
            " shards"
        )
    found, index = stat_of(shard), stat_of(index_path(str(shard)))
    try:
        header = load_header(str(shard)) if index else None
    except DataLost:
        raise
    except DataError:
        header = None
    # Reports of earlier versions state the number of samples only.
    made = {**({"bytes": header.bytes, "sha256": header.sha256} if header else {}), **report}
    if found and (
        found.st_size > made.get("bytes", found.st_size)
        or (header and (header.samples, header.sha256) != (made["samples"], made["sha256"]))
    ):
        raise DataError(
            f"{shard}: not the shard that this ingest made there; move it and its index elsewhere, then run the same"
            " command again to make the missing one"
        )
    problem = None
    if not found:
        problem = "it is missing"
    elif header is None:
        problem = f"its index is {'damaged' if index else 'missing'}"
    elif found.st_size != made["bytes"]:
        problem = f"it has {found.st_size:,} bytes instead of {made['bytes']:,}"
    elif index and index.st_size != made.get("index_bytes", index.st_size):
        problem = "its index is damaged"
    if problem:
        print(f"{shard}: made again, since {problem}", file=sys.stderr, flush=True)
    return problem is None
