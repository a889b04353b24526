"""User-facing explanations of MLflow errors."""

from __future__ import annotations

import re

from . import tracker_errors


def explain(error: Exception, server: str) -> tuple[str, bool]:
    """(one line, whether the error is permanent: a retry does not help until the user acts)."""
    status = _status(error)
    if status in (401, 403):
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"{server} refuses access (HTTP {status}): set {login}", True
    if status == 404 and not is_missing(error):
        return f"{server} is not an MLflow server (HTTP 404): set tracking.uri or MLFLOW_TRACKING_URI", True
    return tracker_errors.explain(error, server)


def is_missing(error: Exception) -> bool:
    """Whether MLflow reports that the requested object does not exist, rather than a wrong address."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _status(error: Exception) -> int | None:
    """HTTP status of an error, which MLflow sets for all its own errors, also those of a database."""
    if (written := re.search(r"failed with error code (\d{3})", str(error))) is not None:
        return int(written[1])
    ask = getattr(error, "get_http_status_code", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, int) else None
