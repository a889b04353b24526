"""User-facing explanations of MLflow errors."""

from __future__ import annotations

import re

from ...data.retry import described
from ...data.transience import verdict
from ...recipes.secrets import HIDDEN, redact
from ..errors import RunError


def explain(error: Exception, server: str) -> tuple[str, bool]:
    """(one line, whether the error is permanent: a retry does not help until the user acts)."""
    if isinstance(error, RunError):
        return str(error), not error.transient
    if isinstance(error, ModuleNotFoundError):
        package = "mlflow" if error.name in ("mlflow", "sqlalchemy", "alembic") else error.name
        return f"{error.name} is not installed: `pip install {package}`, or set tracking.enabled=false", True
    if isinstance(error, ImportError):
        return f"mlflow cannot be imported ({one_line(error)}): install it again, or set tracking.enabled=false", True
    status = _status(error)
    if status in (401, 403):
        login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"{server} refuses access (HTTP {status}): set {login}", True
    if status == 404 and not is_missing(error):
        return f"{server} is not an MLflow server (HTTP 404): set tracking.uri or MLFLOW_TRACKING_URI", True
    found = verdict(error)
    return f"{server} is not available: {one_line(error)}" if found else f"{server}: {one_line(error)}", found is False


def is_missing(error: Exception) -> bool:
    """Whether MLflow reports that the requested object does not exist, rather than a wrong address."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def one_line(error: Exception) -> str:
    """Type and message of an error in one line of bounded length, without secrets."""
    return redact(f"{type(error).__name__}: {described(error)}").replace(f"{HIDDEN}@", "")


def _status(error: Exception) -> int | None:
    """HTTP status of an error, which MLflow sets for all its own errors, also those of a database."""
    if (written := re.search(r"failed with error code (\d{3})", str(error))) is not None:
        return int(written[1])
    ask = getattr(error, "get_http_status_code", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, int) else None
