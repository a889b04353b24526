"""The MLflow run of a training run: its points, settings and files. The one file that imports MLflow."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import yaml

from ..errors import RunError
from .metrics import Tail, read_metrics

log = logging.getLogger(__name__)

FILES_EVERY_S = 30.0  # seconds between two looks for new files while the run goes on
POINTS, PARAMS = 1000, 100  # that MLflow takes in one batch
DOCUMENTS = ("recipe.yaml", "environment.json", "ds_config.json")
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

# MLflow's own defaults retry one request for minutes; retries here are the mirror's, so that it can end in time.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowRun:
    """The MLflow run of a training run: one for all its restarts, its id kept in `tracking.json`.

    Which points the server has is asked of the server, on every connection: no crash can make the two differ.
    `live` says that the training run starts now, for the first time or again.
    RunError when `run_dir` holds no recipe or another process is sending it; OSError when it cannot be written.
    """

    def __init__(self, run_dir: Path, live: bool):
        self.folder = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        try:
            self.recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
        except FileNotFoundError:
            raise RunError(f"{run_dir} is no run folder: it holds no recipe.yaml") from None
        self._lock = _lock(run_dir / ".tracking.lock")
        self._state = self._load()
        self._live = live
        if live:
            self._state["starts"] += 1
            self._store()
        self._client: Any = None
        self._files_due = 0.0  # time.monotonic() of the next look for new files
        self.sent = 0
        self.file_error: str | None = None
        """Why the last look for files did not send them all."""

    def push(self, last: bool) -> None:
        """Send the points that are new; now and then, and when it is the `last` time, files too.

        Raises whatever MLflow raises for points; the next call goes on without losing or repeating one.
        """
        try:
            if self._client is None:
                self._connect()
            records = self._tail.read()
            self._send_points(records)
        except Exception:
            self._client = None  # what of the batch has arrived is unknown: the next connection asks
            raise
        self._new_events = self._new_events or any("event" in record for record in records)
        if last or time.monotonic() >= self._files_due:
            self._send_files()
            self._files_due = time.monotonic() + FILES_EVERY_S

    def end(self, otherwise: str | None) -> None:
        """Set the run's status from the `end` event when that is the last line, else to `otherwise` unless None."""
        last = (read_metrics(self.metrics) or [{}])[-1]
        status = STATUS.get(last.get("outcome", ""), "FINISHED") if last.get("event") == "end" else otherwise
        if status:
            self._client.set_terminated(self._state["run_id"], status, end_time=_milliseconds(last))

    def _load(self) -> dict[str, Any]:
        path = self.folder / "tracking.json"
        try:
            # The key finds a run that was created by a request whose answer, or whose sender, was lost.
            state = json.loads(path.read_text()) if path.exists() else {"key": uuid.uuid4().hex, "starts": 0}
        except json.JSONDecodeError:
            raise RunError(f"{path} is damaged: remove it, and the run is sent to a new MLflow run") from None
        given = (self.recipe.get("tracking") or {}).get("uri") or os.environ.get("MLFLOW_TRACKING_URI")
        # A shell without the variable still finds the server that the run was sent to.
        self._uri = given or state.get("uri") or f"sqlite:///{self.folder.parent / 'mlflow.db'}"
        remembered = _without_password(self._uri) if given or state.get("uri") else None
        self.server = remembered or self._uri
        if "run_id" not in state or state["uri"] != remembered:
            state |= {"uri": remembered, "run_id": None, "files": {}}
        return state

    def _store(self) -> None:
        aside = self.folder / "tracking.json.partial"
        with open(aside, "w") as file:
            json.dump(self._state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.folder / "tracking.json")

    def _connect(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._uri)
        if self._state["run_id"] is None:
            self._store()  # the key, before there is a run that carries it
            self._state["run_id"] = self._find_or_create(client)
            self._store()
        run = client.get_run(self._state["run_id"])
        new = [Param(key, text) for key, text in _flat(self.recipe) if key not in run.data.params]
        for start in range(0, len(new), PARAMS):
            client.log_batch(run.info.run_id, params=new[start : start + PARAMS])
        if self._live:
            client.set_tag(run.info.run_id, "bifrost.restarts", str(self._state["starts"] - 1))
            client.update_run(run.info.run_id, status="RUNNING")
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        self._reached = {key: max(point.step for point in history) for key, history in histories.items()}
        self._tail = Tail(self.metrics)
        self._new_events = False
        self._client = client

    def _find_or_create(self, client: Any) -> str:
        name = (self.recipe.get("tracking") or {}).get("experiment", "bifrost")
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            beside = None if self._state["uri"] else (self.folder.parent / "mlartifacts").as_uri()
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=beside))
        key = self._state["key"]
        found = client.search_runs([experiment.experiment_id], f"tags.`bifrost.key` = '{key}'", max_results=1)
        tags = {"bifrost.key": key, "bifrost.folder": str(self.folder)}
        run = found[0] if found else client.create_run(experiment.experiment_id, tags=tags, run_name=self.folder.name)
        return run.info.run_id

    def _send_points(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = []
        for record in records:
            for key, value in _series(record):
                if record["step"] > self._reached.get(key, -1):
                    self._reached[key] = record["step"]
                    points.append(Metric(key, value, _milliseconds(record), record["step"]))
        for start in range(0, len(points), POINTS):
            batch = points[start : start + POINTS]
            self._client.log_batch(self._state["run_id"], metrics=batch)
            self.sent += len(batch)

    def _send_files(self) -> None:
        try:
            for path in [self.folder / name for name in DOCUMENTS] + sorted((self.folder / "samples").rglob("*.*")):
                if not path.is_file():
                    continue
                name, status = path.relative_to(self.folder), path.stat()
                mark = [status.st_size, status.st_mtime_ns]
                if self._state["files"].get(str(name)) != mark:
                    place = None if name.parent == Path() else str(name.parent)
                    self._client.log_artifact(self._state["run_id"], str(path), place)
                    self._state["files"][str(name)] = mark
                    self._store()
            if self._new_events:
                events = [json.dumps(record) + "\n" for record in read_metrics(self.metrics) if "event" in record]
                self._client.log_text(self._state["run_id"], "".join(events), "events.jsonl")
                self._new_events = False
            self.file_error = None
        except Exception as error:  # a server may take points and have no room for files
            if self.file_error is None:
                log.error("files not sent, points are; will be tried again: %s", one_line(error))
            self.file_error = one_line(error)


def _series(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each number in a record with a step; an event's numbers are named `event/number`."""
    prefix = f"{record['event']}/" if "event" in record else ""
    if isinstance(record.get("step"), int):
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("step", "time"):
                yield re.sub(r"[^\w\-. /]", "_", prefix + key), float(value)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of each setting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)[:6000] if not isinstance(value, str) else value[:6000]


def _milliseconds(record: dict[str, Any]) -> int:
    return int(record.get("time", time.time()) * 1000)


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


def one_line(error: Exception) -> str:
    """Kind and first line of an error, without the password that an address in it may hold."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"//[^/\s]*@", "//", f"{type(error).__name__}: {first}")


def _lock(path: Path) -> Any:
    """A file that is locked until it is closed or garbage. RunError when another process has it."""
    file = open(path, "wb")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{path.parent} is being sent by another process, its mirror: wait until that ends") from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked: %s", path, error)
    return file
