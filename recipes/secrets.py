"""Secrets in URLs: recipes are stored with their run, logged and sent to trackers, and must not contain any."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "REDACTED"
"""Placeholder for a secret; a recipe that contains it is incomplete."""
_LOGIN = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<login>[^/\s?'\"]+)@")
# Signed URLs of Amazon, Google and Azure, and common names of keys. `sig` and `token` match only as whole names.
_QUERY = re.compile(
    r"(?P<before>[?&;](?P<name>[^=&;\s?]*(?:signature|credential|security-token|password|passwd|secret|api[-_]?key|access[-_]?key"
    r"|googleaccessid|auth[-_]?token|access[-_]?token)[^=&;\s?]*|sig|se?token|token|key|auth|pwd)=)(?P<value>[^&;\s'\"]+)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` with the credentials and secret query values of all URLs replaced."""
    text = _LOGIN.sub(lambda found: f"{found['scheme']}{HIDDEN}@", text)
    return _QUERY.sub(lambda found: found["before"] + HIDDEN, text)


def stored_secret(recipe: Any, key: str = "") -> str | None:
    """A message about a setting that would store credentials, with their proper place; None if there is none.
    Signatures in the URLs of shards are allowed: they expire, and are redacted where the recipe is stored."""
    if isinstance(recipe, dict):
        problems = (stored_secret(value, f"{key}.{name}" if key else str(name)) for name, value in recipe.items())
        return next((problem for problem in problems if problem), None)
    if isinstance(recipe, (list, tuple)):
        return next((problem for value in recipe if (problem := stored_secret(value, key))), None)
    if not isinstance(recipe, str):
        return None
    if key == "tracking.uri":
        found = tracker_secret(recipe)
        return f"{key}: {found[0]} in the address would be stored with the run: {found[1]}" if found else None
    if not _logins(recipe):
        return None
    return f"{key}: the login in the address would be stored with the run: {_STORAGE}"


def tracker_secret(uri: str) -> tuple[str, str] | None:
    """The secret in a tracking URI, its login or a query value, and its proper place; None if there is none. A database
    user without a password is not a secret."""
    database = not uri.startswith("http")
    remedy = _DATABASE if database else _TRACKER
    if names := [found["name"] for found in _QUERY.finditer(uri)]:
        return names[0], remedy
    if any(":" in login or not database for login in _logins(uri)):
        return "the login", remedy
    return None


def _logins(text: str) -> list[str]:
    return [found["login"] for found in _LOGIN.finditer(text) if found["login"] != HIDDEN]


_TRACKER = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, instead"
_DATABASE = "set the whole address in MLFLOW_TRACKING_URI, or the password in the database's own way, instead"
_STORAGE = (
    'put it into ~/.netrc, and set FSSPEC_HTTPS=\'{"client_kwargs": {"trust_env": true}}\' (FSSPEC_HTTP for http),'
    " or into the variables of the storage, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)
