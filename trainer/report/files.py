"""Contents of a run folder. The run may be in progress or have no step yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...recipes import with_new_names
from ...recipes.secrets import redact
from ...slurm.run_folder import RECIPES, has_recipe, no_run
from ..distributed.run_lock import STALE_S
from ..errors import RunError
from ..io import read_json
from ..monitors.metrics import iter_metrics, read_events
from .summary import Summary

if TYPE_CHECKING:
    import pandas

METRICS = "metrics.jsonl"
ENDS = {
    "stopped": "stopped by a signal, can be resumed",
    "interrupted": "quit by Ctrl-C without a save, can be resumed from its last checkpoint",
}
"""Outcome of an attempt -> what it means."""


@dataclass(frozen=True)
class RunFiles:
    """recipe, environment, kernels: content of the files of these names, {} if missing; metrics: of metrics.jsonl."""

    name: str
    """As displayed."""
    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    kernels: dict[str, Any]
    metrics: Summary = field(repr=False)

    @property
    def goodput(self) -> dict[str, Any] | None:
        """The figures of `bifrost goodput`; None before the first attempt."""
        return self.metrics.ledger.summary() if self.metrics.counts["start"] else None

    def steps(self) -> pandas.DataFrame:
        """The logged steps, a row each with its step as the index; a column per key of metrics.jsonl, NaN where a line
        has none. The whole file is read again. Needs pandas."""
        import pandas

        records = (record for part in iter_metrics(self.folder / METRICS) for record in part)
        rows = [record for record in records if "event" not in record]
        return pandas.DataFrame(rows).set_index("step") if rows else pandas.DataFrame()

    def events(self) -> list[dict[str, Any]]:
        """The events of metrics.jsonl, such as checkpoints, validations, and starts and ends of attempts, in order."""
        return read_events(self.folder / METRICS)

    def state(self, now: float | None = None) -> str:
        """The run's state in a few words."""
        turn = self.metrics.turn
        return run_state([turn] if turn else [], self.folder, time.time() if now is None else now)[1]


def run_state(records: Sequence[dict[str, Any]], folder: Path, now: float) -> tuple[str, str]:
    """State of a run from its newest records, and a few words: `new`, `running`, `stopped`, `interrupted`, `finished`
    or `failed`."""
    turns = [record for record in records if record.get("event") in ("start", "end", "hang")]
    # The newest records of a long attempt may lack its first one.
    last = turns[-1] if turns else {"event": "start"} if records else None
    owner = read_json(folder / "lock.json") or {}
    silent = now - owner.get("beat", 0.0)
    if last is None:
        return ("running", "starting") if silent <= STALE_S else ("new", "not started yet")
    if last["event"] == "hang":
        return "failed", "hung, ended by the watchdog"
    if last["event"] == "end":
        return last["outcome"], ENDS.get(last["outcome"], last["outcome"])
    if silent <= STALE_S:
        return "running", f"running, last sign of life {max(silent, 0):.0f} s ago"
    return "failed", "ended without a record: killed, or its node was lost"


def is_run(folder: Path) -> bool:
    """Whether a run has written into `folder`, or was submitted from it."""
    return has_recipe(folder) or (folder / METRICS).is_file()


def open_run(folder: str | Path, name: str | None = None, metrics: Summary | None = None) -> RunFiles:
    """The run in `folder`; RunError if there is none. metrics: left as it is, for a caller that reads the file."""
    folder = Path(folder)
    recipe = next((file for place in RECIPES if (file := folder / place).is_file()), None)
    if not is_run(folder):
        raise RunError(no_run(folder, "recipe.yaml and no metrics.jsonl"))
    try:
        # Pages are shared: remove passwords from addresses.
        text = redact(recipe.read_text(encoding="utf-8")) if recipe else ""
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RunError(f"{recipe}: not valid YAML: {' '.join(str(error).split())}") from None
    return RunFiles(
        name or folder.resolve().name,
        folder,
        with_new_names(settings) if isinstance(settings, dict) else {},
        read_json(folder / "environment.json") or {},
        read_json(folder / "kernels.json") or {},
        Summary().read_all(folder / METRICS) if metrics is None else metrics,
    )
