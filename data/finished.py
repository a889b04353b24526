"""Whether the shards of an earlier ingest attempt are still as it made them: by sizes and hashes, not by content.

The report of a shard is written last. It states the shard's size and hash and the size of its index, so that a check
costs two small reads per shard.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .errors import DataError, DataLost, DataMissing
from .files import content, file_size, write
from .index import Header, index_path, load_header


def save_report(url: str, shard: str, header: Header, rejected: list[tuple[str, str]]) -> None:
    """Record that `shard` and its index are complete, with what they left out."""
    report = {
        "samples": header.samples,
        "rejected": rejected,
        "bytes": header.bytes,
        "sha256": header.sha256,
        "index_bytes": file_size(index_path(shard)) or 0,
    }
    write(url, json.dumps(report).encode())


def load_report(url: str) -> dict[str, Any] | None:
    """The report of a shard; None when there is none, or it is damaged."""
    try:
        report = json.loads(content(url))
        return report if report.keys() >= {"samples", "rejected"} else None
    except DataMissing:
        return None
    except DataError:
        raise
    except (ValueError, AttributeError):
        return None


def is_finished(shard: str, url: str) -> bool:
    """Whether `shard` has a report, at `url`, and it and its index still fit it; otherwise the shard has to be made.

    Prints a line for a shard that was finished and is now missing or truncated, or has no usable index. Raises
    DataError when another shard took its place, which is not overwritten.
    """
    report = load_report(url)
    if report is None:
        return False
    if report.get("unused_captions"):
        raise DataError(
            f"{shard}: made by an earlier version, with only the first caption of each list; name a new folder for the"
            " shards"
        )
    size, index_size = file_size(shard), file_size(index_path(shard))
    try:
        header = load_header(shard) if index_size is not None else None
    except DataLost:
        raise
    except DataError:
        header = None
    # Reports of earlier versions state the number of samples only.
    made = {**({"bytes": header.bytes, "sha256": header.sha256} if header else {}), **report}
    if size is not None and (
        size > made.get("bytes", size)
        or (header and (header.samples, header.sha256) != (made["samples"], made["sha256"]))
    ):
        raise DataError(
            f"{shard}: not the shard that this ingest made there; move it and its index elsewhere, then run the same"
            " command again to make the missing one"
        )
    problem = None
    if size is None:
        problem = "it is missing"
    elif header is None:
        problem = f"its index is {'missing' if index_size is None else 'damaged'}"
    elif size != made["bytes"]:
        problem = f"it has {size:,} bytes instead of {made['bytes']:,}"
    elif index_size != made.get("index_bytes", index_size):
        problem = "its index is damaged"
    if problem:
        print(f"{shard}: made again, since {problem}", file=sys.stderr, flush=True)
    return problem is None
