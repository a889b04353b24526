"""Check of the MLflow store, without importing MLflow, which takes seconds."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from ...recipes.secrets import HIDDEN, redact, tracker_secret
from .finding import Finding
from .folders import runs_folder

SERVER_S = 5.0
"""Time limit of a server's answer."""


def mlflow(folder: Path, uri: str | None, variable: str | None = None) -> list[Finding]:
    """The store at `uri`, else at `variable`, the value of MLFLOW_TRACKING_URI, else in the folder of runs. Only the
    variable may contain a database's password."""
    given, uri = uri, uri or variable
    if not uri:
        return [Finding("MLflow", f"{folder / 'mlflow.db'}, no server configured")]
    parts = urlsplit(uri)
    shown = redact(uri).replace(f"{HIDDEN}@", "")
    if (secret := tracker_secret(uri)) and (given or uri.startswith("http")):
        return [Finding("MLflow", shown, "missing", f"{secret[0]} is in the address: {secret[1]}")]
    if parts.scheme in ("http", "https"):
        return [_server(uri)]
    if parts.scheme == "sqlite":
        place = Path(uri.removeprefix("sqlite:///")).parent
        return [runs_folder(place)[0]._replace(what="MLflow")]
    if parts.scheme in ("", "file"):
        remedy = "MLflow no longer supports folders: use sqlite:///FILE, or a server's http://HOST:PORT"
        return [Finding("MLflow", uri, "warning", remedy)]
    return [Finding("MLflow", f"{shown}, not checked")]


def _server(uri: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_S) as answer:
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        remedy = f"no answer ({reason}): check address and server, or set tracking.enabled=false"
        return Finding("MLflow", uri, "missing", remedy)
    if code in (401, 403):
        remedy = f"answers {code}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Finding("MLflow", uri, "warning", remedy)
    if code != 200:
        return Finding("MLflow", uri, "missing", f"/health answers {code}: is this MLflow's address?")
    return Finding("MLflow", f"{uri} answers")
