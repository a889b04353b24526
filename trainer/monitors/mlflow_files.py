"""Files of a run folder that are logged as MLflow artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .metrics import read_events
from .renames import previews
from .tracker_errors import one_line

DOCUMENTS = ("recipe.yaml", "environment.json", "ds_config.json")


def send_files(
    client: Any, run_id: str, folder: Path, sent: dict[str, list[int]], note: Callable[[], None], events: bool
) -> str | None:
    """Send new and changed files, and with `events` all events as one file; return the reason of a failure, else None.

    sent: size and modification time of each sent file, updated in place. note: called after each file.
    """
    try:
        for path in [folder / name for name in DOCUMENTS] + sorted(previews(folder).rglob("*.*")):
            if not path.is_file():
                continue
            name, status = path.relative_to(folder), path.stat()
            mark = [status.st_size, status.st_mtime_ns]
            if sent.get(str(name)) != mark:
                client.log_artifact(run_id, str(path), None if name.parent == Path() else str(name.parent))
                sent[str(name)] = mark
                note()
        if events:
            lines = [json.dumps(record) + "\n" for record in read_events(folder / "metrics.jsonl")]
            client.log_text(run_id, "".join(lines), "events.jsonl")
    except Exception as error:  # a server may accept metrics and have no space for files
        return one_line(error)
    return None
