"""Whether the store that runs are mirrored to can be reached. Asked without MLflow itself, which loads for seconds."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from .finding import Finding
from .places import runs_folder

SERVER_S = 5.0
"""How long a server may take to answer."""


def mlflow(folder: Path, uri: str | None) -> list[Finding]:
    """The store at `uri`, or without one the file in the folder of runs."""
    if not uri:
        return [Finding("MLflow", f"{folder / 'mlflow.db'}, no server asked for")]
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        remedy = "no password in the address: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return [Finding("MLflow", uri.replace(parts.netloc, parts.netloc.rpartition("@")[2]), "missing", remedy)]
    if parts.scheme in ("http", "https"):
        return [_server(uri)]
    if parts.scheme == "sqlite":
        place = Path(uri.removeprefix("sqlite:///")).parent
        return [runs_folder(place)[0]._replace(what="MLflow")]
    if parts.scheme in ("", "file"):
        remedy = "MLflow no longer takes folders: sqlite:///FILE, or a server's http://HOST:PORT"
        return [Finding("MLflow", uri, "warning", remedy)]
    return [Finding("MLflow", f"{uri}, not asked")]


def _server(uri: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_S) as answer:
            code = answer.status
    except urllib.error.HTTPError as error:
        code = error.code
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        remedy = f"no answer ({reason}): check the address, and whether the server runs; or tracking.enabled=false"
        return Finding("MLflow", uri, "missing", remedy)
    if code in (401, 403):
        remedy = f"answers {code}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return Finding("MLflow", uri, "warning", remedy)
    if code != 200:
        return Finding("MLflow", uri, "missing", f"/health answers {code}: is this MLflow's address?")
    return Finding("MLflow", f"{uri} answers")
