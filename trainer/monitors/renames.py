"""Names in metrics.jsonl, and a folder of a run, that have been changed: read as those of today. See CHANGELOG.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

METRICS = {
    "digest": "data_digest",
    "gathered_gb_per_s": "allgather_gb_per_s",
    "loss_little_noise": "loss_low_noise",
    "loss_much_noise": "loss_high_noise",
    "own_s_max": "rank_work_s_max",
    "own_s_median": "rank_work_s_median",
}
EVENTS = {
    "hung": "hang",
    "interval": "checkpoint_interval",
    "new_level": "baseline_reset",
    "replaced": "bad_samples",
    "skipped": "skipped_step",
}
FIELDS = {
    "hang": {"bound_s": "timeout_s", "section": "phase", "silent_s": "stalled_s"},
    "rollback": {"gap_s": "downtime_s", "passed_over": "skipped_batches"},
    "save_failed": {"in_a_row": "consecutive_failures"},
    "start": {"gap_s": "downtime_s"},
    "straggler": {"others_s": "others_median_s", "section": "phase"},
}
"""Event, as it is named today -> its fields."""

PREVIEWS, OLD_PREVIEWS = "previews", "samples"


def with_new_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl with today's names, in the same order; the same object where it has them already."""
    event = record.get("event")
    event = EVENTS.get(event, event) if isinstance(event, str) else None
    names = METRICS if event is None else FIELDS.get(event, {})
    if event == record.get("event") and record.keys().isdisjoint(names):
        return record
    found = {names.get(key, key): value for key, value in record.items()}
    return found if event is None else found | {"event": event}


def previews(run: Path) -> Path:
    """The run's folder of previews, under the name that it has."""
    old = run / OLD_PREVIEWS
    return old if old.is_dir() and not (run / PREVIEWS).exists() else run / PREVIEWS


def rename_previews(run: Path) -> None:
    """Give the folder of previews today's name. Raises OSError."""
    if (found := previews(run)).name == OLD_PREVIEWS:
        found.rename(run / PREVIEWS)
