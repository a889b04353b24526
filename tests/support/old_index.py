"""Indexes of shards as version 1 wrote them, without the sizes of images."""

from __future__ import annotations

import json
from pathlib import Path


def as_version_1(shard: Path) -> None:
    """Rewrite the index of a shard."""
    index = shard.with_suffix(".index.jsonl")
    header, *lines = (json.loads(line) for line in index.read_text().splitlines())
    written = [{**header, "version": 1}, *(line[:2] for line in lines)]
    index.write_text("".join(json.dumps(line) + "\n" for line in written))
