"""Whether the store that runs are mirrored to can be reached. Asked without MLflow itself, which loads for seconds."""

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
"""How long a server may take to answer."""


def mlflow(folder: Path, uri: str | None, variable: str | None = None) -> list[Finding]:
    """The store at `uri`, else at that of MLFLOW_TRACKING_URI, `variable`, or without one the file in the folder of
    runs. A database's whole address may be in the variable, and nowhere else."""
    given, uri = uri, uri or variable
    if not uri:
        return [Finding("MLflow", f"{folder / 'mlflow.db'}, no server asked for")]
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
        remedy = "MLflow no longer takes folders: sqlite:///FILE, or a server's http://HOST:PORT"
        return [Finding("MLflow", uri, "warning", remedy)]
    return [Finding("MLflow", f"{shown}, not asked")]


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
