"""User-facing explanations of what trackers, their files and servers raise."""

from __future__ import annotations

from ...data.retry import described
from ...data.transience import verdict
from ...recipes.secrets import HIDDEN, redact
from ..errors import RunError


def explain(error: Exception, place: str) -> tuple[str, bool]:
    """(one line, whether the error is permanent: a retry does not help until the user acts). place: the server, folder
    or tracker."""
    if isinstance(error, RunError):
        return str(error), not error.transient
    if isinstance(error, ModuleNotFoundError):
        package = "mlflow" if error.name in ("mlflow", "sqlalchemy", "alembic") else error.name
        return f"{error.name} is not installed: `pip install {package}`, or set tracking.enabled=false", True
    if isinstance(error, ImportError):
        name = (error.name or place).partition(".")[0]
        return f"{name} cannot be imported ({one_line(error)}): install it again, or set tracking.enabled=false", True
    found = verdict(error)
    return f"{place} is not available: {one_line(error)}" if found else f"{place}: {one_line(error)}", found is False


def one_line(error: Exception) -> str:
    """Type and message of an error in one line of bounded length, without secrets."""
    return redact(f"{type(error).__name__}: {described(error)}").replace(f"{HIDDEN}@", "")
