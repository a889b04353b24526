"""A run's latest values as a file for the textfile collector of Prometheus' node exporter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...data.atomic import write_atomic
from ..io import read_json
from .metrics import Tail
from .series import series, when
from .tracker_state import last_end, lock, outcome_of, read_recipe

SUFFIX = ".prom"
"""The collector reads files with it."""
LABELS = ("run", "stage")


class PrometheusFile:
    """The latest value of each series of a run, counts of its events, and its state. After the end of an attempt only
    the state remains, so that the curves end too.

    Raises RunError if `run_dir` has no recipe or another process is writing the file.
    """

    def __init__(self, run_dir: Path, live: bool):
        recipe = read_recipe(run_dir)
        self._lock = lock(run_dir / ".prometheus.lock")
        self.folder = run_dir
        self.path = file_of(recipe["tracking"]["prometheus"], run_dir.name)
        self.server = str(self.path)
        self.sent = 0
        self.file_error: str | None = None
        self._labels = [run_dir.name, str(recipe.get("stage", ""))]
        self._steps = recipe.get("steps")
        self._tail = Tail(run_dir / "metrics.jsonl")
        self._begin()

    def push(self, last: bool) -> None:
        """Replace the file if there is something new. Raises OSError; the next call then writes everything."""
        records = self._tail.read()
        if self._tail.replaced:
            self._begin()
        for record in records:
            self._add(record)
        if records or not self._written:
            self._write(self._state(1) + self._values())

    def end(self, otherwise: str | None) -> None:
        """Leave the state, with the outcome of the newest `end` event unless the run was restarted since, else
        `otherwise`."""
        outcome = outcome_of(last_end(self.folder / "metrics.jsonl"), otherwise or "failed")
        ended = self._gauge("run_outcome", "1 for how the last attempt ended", 1, outcome=outcome)
        self._write([*self._state(0), ended])

    def address(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._lock.close()

    def _begin(self) -> None:
        self._latest: dict[str, float] = {}
        self._events: Counter[str] = Counter()
        self._step, self._moment, self._written = 0, 0.0, False

    def _add(self, record: dict[str, Any]) -> None:
        self._latest.update(series(record))
        if "event" in record:
            self._events[str(record["event"])] += 1
        elif isinstance(record.get("step"), int):
            self._step, self._moment = record["step"], when(record)

    def _state(self, active: int) -> list[Any]:
        ranks = str((read_json(self.folder / "environment.json") or {}).get("ranks", ""))
        found = [
            self._gauge("run_info", "1; its labels describe the run", 1, ranks=ranks),
            self._gauge("run_active", "1 while an attempt is training", active),
            self._gauge("run_step", "last logged step", self._step),
            self._gauge("run_step_timestamp_seconds", "Unix time of the last logged step", self._moment),
        ]
        return found if self._steps is None else [*found, self._gauge("run_steps", "steps of the recipe", self._steps)]

    def _values(self) -> list[Any]:
        from prometheus_client.core import CounterMetricFamily

        events = CounterMetricFamily("bifrost_events", "events in metrics.jsonl", labels=[*LABELS, "event"])
        for event, count in sorted(self._events.items()):
            events.add_metric([*self._labels, event], count)
        named = {metric_name(name): (name, value) for name, value in sorted(self._latest.items())}
        text = "latest value of {} in metrics.jsonl"
        return [events, *(self._gauge(key, text.format(name), value) for key, (name, value) in named.items())]

    def _gauge(self, name: str, text: str, value: float, **labels: str) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"bifrost_{name}", text, labels=[*LABELS, *labels])
        family.add_metric([*self._labels, *labels.values()], value)
        return family

    def _write(self, families: Iterable[Any]) -> None:
        from prometheus_client import CollectorRegistry, generate_latest

        self._written = False
        registry = CollectorRegistry()
        registry.register(_Collected(families))
        # The node exporter runs as another user.
        write_atomic(self.path, generate_latest(registry), mode=0o644)
        self._written = True


class _Collected:
    """What a registry of prometheus_client collects."""

    def __init__(self, families: Iterable[Any]):
        self.families = families

    def collect(self) -> Iterable[Any]:
        return self.families


def file_of(place: str, run: str) -> Path:
    """The file of the setting `tracking.prometheus`: itself, or a file named after the run in a folder."""
    path = Path(place)
    return path if path.suffix == SUFFIX else path / f"bifrost-{run}{SUFFIX}"


def metric_name(name: str) -> str:
    """`train_loss` of `train/loss`."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)
