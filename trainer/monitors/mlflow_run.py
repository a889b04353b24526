"""The MLflow run of a training run: metrics, parameters and artifacts."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

from ...recipes.secrets import HIDDEN, redact
from ...slurm.io import write_json
from ..errors import RunError
from .evaluations import FILE as EVALUATIONS
from .metrics import Tail, iter_metrics, read_events
from .mlflow_errors import is_missing
from .mlflow_files import send_files
from .mlflow_store import ensure_store, is_database, require_current
from .mlflow_tags import EXPERIMENT_TAGS, LONGEST_TAG, dataset_input, parameters, run_tags
from .series import series, series_name, when
from .tracker_errors import one_line
from .tracker_state import is_copy, last_end, lock, read_recipe

log = logging.getLogger(__name__)

FILE = "tracking.json"
FILES_EVERY_S = 30.0  # seconds between checks for new files during training
POINTS, PARAMS = 1000, 100  # MLflow's limits per batch
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "interrupted": "KILLED", "failed": "FAILED"}
LOSS = series_name("loss", None)
AS_TRAINING = "workflowType=machine_learning"
"""URL parameter that makes MLflow 3 show its model training pages instead of those for LLM applications."""
HARMLESS = (
    *("tracking.", "checkpoint.", "watchdog.", "previews.", "validation.", "log_every", "runs_dir", "data.workers"),
    *("micro_batch", "activation_checkpointing", "zero."),
)
"""Settings that do not affect the logged loss."""

# MLflow's defaults retry a request for minutes; the mirror retries itself, so that it can end in time.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowRun:
    """The MLflow run of a training run: one for all attempts, with its id in `tracking.json`.

    Every connection queries which points the server has, so that a crash cannot make the two differ. MLflow cannot
    delete points: if the training run dropped steps that were sent and repeats them differently, a new MLflow run
    replaces the old one.

    live: the training run is starting or resuming now. Raises RunError if `run_dir` has no recipe or another process
    is sending it, OSError if it cannot be written.
    """

    def __init__(self, run_dir: Path, live: bool):
        self.folder = run_dir
        self.metrics = run_dir / "metrics.jsonl"
        self.recipe = read_recipe(run_dir)
        self._lock = lock(run_dir / ".tracking.lock")
        self._live = live
        self._state = self._load()
        if live:
            self._state["starts"] += 1
            self._store()
        self._client: Any = None
        self._files_due = 0.0  # time.monotonic() of the next check for new files
        self.sent = 0
        self.file_error: str | None = None
        """Why the last check for files did not send them all."""

    def push(self, last: bool) -> None:
        """Send new points, and periodically and on the `last` call, files.

        Raises MLflow's errors for points; the next call continues without losing or repeating one.
        """
        try:
            if self._client is None:
                self._connect()
            records = self._tail.read()
            while any(record.get("event") == "rollback" for record in records) and self._rollbacks_to_see():
                self._connect()
                records = self._tail.read()
            self._send_points([*records, *self._evaluations.read()])
        except Exception:
            self._client = None  # unknown how much of the batch arrived: the next connection queries it
            raise
        self._new_events = self._new_events or any("event" in record for record in records)
        if last or time.monotonic() >= self._files_due:
            run_id, sent = self._state["run_id"], self._state["files"]
            problem = send_files(self._client, run_id, self.folder, sent, self._store, self._new_events)
            if problem and self.file_error is None:
                log.error("metrics were sent, files were not; will retry: %s", problem)
            self._new_events = self._new_events and problem is not None
            self.file_error = problem
            self._files_due = time.monotonic() + FILES_EVERY_S

    def end(self, otherwise: str | None) -> None:
        """Set the run's status from its newest `end` event unless it was restarted since, else to `otherwise` if not
        None."""
        last = last_end(self.metrics)
        status = STATUS.get(last.get("outcome", ""), "FINISHED") if last else STATUS.get(otherwise or "")
        if status:
            self._client.set_terminated(self._state["run_id"], status, end_time=_milliseconds(last or {}))

    def address(self) -> str:
        """Address of the run for the user, once something was sent."""
        place = f"#/experiments/{self._experiment}/runs/{self._state['run_id']}?{AS_TRAINING}"
        if self.server.startswith("http"):
            return f"{self.server.rstrip('/')}/{place}"
        return f"`mlflow ui --backend-store-uri {self.server}`, then http://127.0.0.1:5000/{place}"

    def close(self) -> None:
        self._lock.close()

    def _load(self) -> dict[str, Any]:
        path = self.folder / FILE
        try:
            # The key finds a run created by a request whose reply, or whose sender, was lost.
            state = json.loads(path.read_text()) if path.exists() else {"key": uuid.uuid4().hex, "starts": 0}
        except json.JSONDecodeError:
            raise RunError(f"{path} is damaged: remove it, and the run is sent to a new MLflow run") from None
        if is_copy(state, self.folder, FILE):
            log.info("%s is a copy of %s: it gets its own MLflow run", self.folder, state["folder"])
            state = {"key": uuid.uuid4().hex, "starts": 0, "uri": state.get("uri")}
        state["folder"] = str(self.folder.resolve())
        given = (self.recipe.get("tracking") or {}).get("uri") or os.environ.get("MLFLOW_TRACKING_URI")
        # A shell without the variable still finds the server to which the run was sent.
        self._uri = given or state.get("uri") or f"sqlite:///{self.folder.parent / 'mlflow.db'}"
        self.server = redact(self._uri).replace(f"{HIDDEN}@", "")
        state = {"uri": None, "run_id": None, "files": {}, "rollbacks": 0, "replaced": [], **state}
        self._target = self.server if given or state["uri"] else None
        # Runs that were never sent keep the address of their training. An existing MLflow run is replaced only once the
        # server of another address has created its own: a mistyped one, or a server that is down, must not redirect it.
        if self._live and state["run_id"] is None:
            state["uri"] = self._target
        return state

    def _store(self) -> None:
        write_json(self.folder / FILE, self._state)

    def _connect(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        ensure_store(self._uri)
        from mlflow import MlflowClient

        if is_database(self._uri):
            require_current(self._uri)
        client = MlflowClient(self._uri)
        events = read_events(self.metrics)
        run = self._run(client, _begun(next(iter_metrics(self.metrics), [{}])[0]))
        history = client.get_metric_history(run.info.run_id, LOSS) if LOSS in run.data.metrics else []
        if self._dropped(events, max((point.step for point in history), default=0), run.data.params):
            self._state |= {"key": uuid.uuid4().hex, "run_id": None, "files": {}}
            self._state["replaced"].append(run.info.run_id)
            run = self._run(client, run.info.start_time)
        self._state["rollbacks"] = _rollbacks(events)
        self._store()
        self._mark_replaced(client)
        self._send_settings(client, run, events)
        histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        self._reached = {key: max(point.step for point in history) for key, history in histories.items()}
        self._seen = {(key, p.step, p.timestamp) for key, history in histories.items() for p in history}
        self._tail, self._evaluations = Tail(self.metrics), Tail(self.folder / EVALUATIONS)
        self._new_events = False
        self._client = client

    def _run(self, client: Any, start_time: int) -> Any:
        """Find or create the run on the server. Raises RunError if it was deleted there."""
        from mlflow.exceptions import MlflowException

        run = None
        if self._state["run_id"] is not None and self._state["uri"] == self._target:
            try:
                run = client.get_run(self._state["run_id"])
            except MlflowException as error:
                if not is_missing(error):
                    raise
                log.warning("%s no longer has run %s: a new one is created", self.server, self._state["run_id"])
                self._state |= {"run_id": None, "files": {}}
        if run is None:
            run = self._find_or_create(client, start_time)
            self._state |= {"uri": self._target, "run_id": run.info.run_id, "files": {}}
            self._store()
        self._experiment = run.info.experiment_id
        if run.info.lifecycle_stage == "deleted":
            self._require_active(client.get_experiment(run.info.experiment_id))
            command = f"MLFLOW_TRACKING_URI={self.server} mlflow runs restore --run-id {run.info.run_id}"
            raise RunError(
                f"the run was deleted in MLflow: `{command}` restores it; or remove"
                f" {self.folder / 'tracking.json'} to send it to a new one"
            )
        return run

    def _require_active(self, experiment: Any) -> None:
        if experiment.lifecycle_stage == "deleted":
            command = f"MLFLOW_TRACKING_URI={self.server} mlflow experiments restore -x {experiment.experiment_id}"
            raise RunError(
                f"the experiment {experiment.name} was deleted in MLflow: `{command}` restores it; or set another"
                " tracking.experiment"
            )

    def _find_or_create(self, client: Any, start_time: int) -> Any:
        from mlflow.exceptions import MlflowException

        name = (self.recipe.get("tracking") or {}).get("experiment", "bifrost")
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            artifacts = None if self._target else (self.folder.parent / "mlartifacts").as_uri()
            try:
                client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(name)
        self._require_active(experiment)
        key = self._state["key"]
        found = client.search_runs([experiment.experiment_id], f"tags.`bifrost.key` = '{key}'", max_results=1)
        if found:
            return found[0]
        self._store()  # store the key before a run carries it
        tags = {**run_tags(self.folder, self.recipe), "bifrost.key": key}
        return client.create_run(experiment.experiment_id, start_time, tags=tags, run_name=self.folder.name)

    def _dropped(self, events: list[dict[str, Any]], reached: int, params: dict[str, str]) -> bool:
        """Whether the server has points, up to step `reached`, of steps that the run dropped and repeats differently: a
        rollback skips samples, and a resume with other settings changes later steps."""
        rollbacks = [event for event in events if event["event"] == "rollback"][self._state["rollbacks"] :]
        if any(reached > rollback["to"] for rollback in rollbacks):
            return True
        started = [event["step"] for event in events if event["event"] == "start"]
        return self._live and bool(started) and reached > started[-1] and bool(self._changed(params))

    def _changed(self, params: dict[str, str]) -> dict[str, tuple[str, str]]:
        """Settings that differ from the server's: key -> (there, here)."""
        here = dict(parameters(self.recipe))
        return {
            key: (params[key], text)
            for key, text in here.items()
            if params.get(key, text) != text and not key.startswith(HARMLESS)
        }

    def _rollbacks_to_see(self) -> bool:
        return _rollbacks(read_events(self.metrics)) > self._state["rollbacks"]

    def _mark_replaced(self, client: Any) -> None:
        """Mark the runs that this one replaced."""
        for old in self._state["replaced"]:
            note = f"Ends with dropped steps. Run {self._state['run_id']} has the complete history without them."
            try:
                client.set_tag(old, "bifrost.replaced_by", self._state["run_id"])
                client.set_tag(old, "mlflow.note.content", note)
                client.update_run(old, name=f"{self.folder.name} (dropped)")
                client.set_terminated(old, "KILLED")
            except Exception as error:  # it may have been deleted; only the new run matters
                log.warning("run %s could not be marked as replaced: %s", old, one_line(error))
        if self._state["replaced"]:
            client.set_tag(self._state["run_id"], "bifrost.continues", self._state["replaced"][-1])
            self._state["replaced"] = []
            self._store()

    def _send_settings(self, client: Any, run: Any, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param

        run_id = run.info.run_id
        new = [Param(key, text) for key, text in parameters(self.recipe) if key not in run.data.params]
        for start in range(0, len(new), PARAMS):
            client.log_batch(run_id, params=new[start : start + PARAMS])
        if not run.inputs.dataset_inputs and (data := dataset_input(self.folder, self.recipe)):
            client.log_inputs(run_id, [data])
        if not self._live:
            return
        tags = {"bifrost.restarts": str(self._state["starts"] - 1), "bifrost.folder": str(self.folder)}
        step = max((event["step"] for event in events if event["event"] == "start"), default=0)
        for key, (there, here) in self._changed(run.data.params).items():
            tags[f"bifrost.changed.{key}"] = f"{there} -> {here}, step {step}"[:LONGEST_TAG]
        for key, text in tags.items():
            client.set_tag(run_id, key, text)
        client.update_run(run_id, status="RUNNING")

    def _send_points(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = []
        for record in records:
            moment = _milliseconds(record)
            for key, value in series(record):
                if "event" in record:  # several events may have the same step or an earlier one
                    fresh = (key, record["step"], moment) not in self._seen
                else:
                    fresh = record["step"] > self._reached.get(key, -1)
                    self._reached[key] = max(record["step"], self._reached.get(key, -1))
                if fresh:
                    self._seen.add((key, record["step"], moment))
                    points.append(Metric(key, value, moment, record["step"]))
        for start in range(0, len(points), POINTS):
            batch = points[start : start + POINTS]
            self._client.log_batch(self._state["run_id"], metrics=batch)
            self.sent += len(batch)


def _begun(first: dict[str, Any]) -> int:
    """Unix time in milliseconds at which a run with this first record began; it may be sent long after."""
    return _milliseconds(first) - int(1000 * first.get("startup_s", 0.0))


def _milliseconds(record: dict[str, Any]) -> int:
    return int(1000 * when(record))


def _rollbacks(events: list[dict[str, Any]]) -> int:
    return sum(event["event"] == "rollback" for event in events)
