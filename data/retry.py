"""The retry policy for storage, network and services: transient errors are retried."""

from __future__ import annotations

import errno
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from .errors import DataError, DataLost, DataMissing, InvalidResponse
from .transience import causes, is_missing, judged, lacks_credentials, status, verdict

if TYPE_CHECKING:
    from tenacity import RetryCallState

log = logging.getLogger(__name__)
Result = TypeVar("Result")

PATIENCE_S = 10.0
"""Total seconds of pauses before giving up on a transient error."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
RETRY_AFTER_LIMIT_S = 60.0
"""Total seconds that servers may add by requesting longer pauses (Retry-After)."""
SHOWN_CHARACTERS = 300
"""Limit for an error's text: some clients quote a whole page."""


def is_transient(error: BaseException) -> bool:
    """Whether the failed operation may succeed later without any change: storage or a service is unavailable, busy or
    the connection broke. Searches the causes. False for missing files, permissions, credentials, full disks, and for
    errors unrelated to storage."""
    return verdict(error) is True


def retrying(action: Callable[[], Result], where: object, patience_s: float | None = None) -> Result:
    """The result of `action`, retried on transient errors with exponential, jittered pauses of `patience_s` (None:
    PATIENCE_S) seconds in total. The first retry logs one warning that names `where`. The last error is raised
    unchanged. A DataError was already retried at its origin and is raised at once. When every response was wrong, the
    `InvalidResponse` is marked as lasting, since the server will not recover by itself."""
    try:
        return action()  # without tenacity, which takes as long as a local read
    except Exception as error:
        failed = [error]

    def attempt() -> Result:
        if failed:
            raise failed.pop()
        return action()

    from tenacity import Retrying, retry_if_exception

    patience = PATIENCE_S if patience_s is None else patience_s
    own = spent = 0.0  # seconds of pauses, excluding server requests: with and without the coming one
    all_wrong = True

    def pause_s(state: RetryCallState) -> float:
        nonlocal own, spent
        spent = own
        left_to_servers = RETRY_AFTER_LIMIT_S - (state.idle_for - own)
        growing = min(FIRST_PAUSE_S, patience / 20) * 2 ** (state.attempt_number - 1)
        pause = min(growing, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)  # ranks that fail together retry apart
        pause = min(pause, patience - own)
        own += pause
        return max(pause, min(_retry_after_s(_error(state)), left_to_servers))

    def warn(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.warning("%s: %s; retrying for up to %g s", where, described(_error(state)), patience)

    def should_retry(error: BaseException) -> bool:
        nonlocal all_wrong
        wrong = [link for link in causes(error) if isinstance(link, InvalidResponse)]
        all_wrong = all_wrong and bool(wrong)
        if not is_transient(error) or hasattr(error, "transient"):
            return False
        if all_wrong and own >= patience:
            wrong[0].lasting = True
            return False
        return True

    for again in Retrying(
        retry=retry_if_exception(should_retry),
        wait=pause_s,
        stop=lambda state: spent >= patience,
        before_sleep=warn,
        sleep=_sleep,
        reraise=True,
    ):
        with again:
            return attempt()
    raise AssertionError("tenacity returns or raises")


def call(action: Callable[[], Result], where: object, patience_s: float | None = None) -> Result:
    """`retrying`, with errors of storage, network and services converted to DataErrors.

    Raises DataLost when a transient error outlasts the retries, DataMissing when the file or object does not exist,
    DataError for other permanent errors. All other exceptions, such as bugs, are raised unchanged.
    """
    try:
        return retrying(action, where, patience_s)
    except Exception as error:
        if hasattr(error, "transient") or verdict(error) is None:
            raise
        raise failure(where, error) from error


def failure(where: object, error: BaseException) -> DataError:
    """The one-line error for a failure of storage, network or a service at `where`: DataLost if transient, DataMissing
    if nothing exists there, otherwise DataError with what to do."""
    kind = DataLost if is_transient(error) else DataMissing if is_missing(error) else DataError
    return kind(f"{where}: {described(error)}; {remedy(error)}")


def described(error: BaseException) -> str:
    """An error in one line of bounded length: of wrapped errors the one that decides the verdict; the class name when
    it has no text."""
    _, link = judged(error)
    if type(link).__module__.startswith("aiohttp") and "Redirect" in type(link).__name__:
        loop = type(link).__name__ == "TooManyRedirects"  # its text is a status of 0; the others' is the address
        return "the server redirects in a loop" if loop else f"the server redirects to {link}"[:SHOWN_CHARACTERS]
    text = getattr(link, "strerror", None) if isinstance(link, OSError) else None
    text = " ".join(str(text or link).split()) or type(link).__name__
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def remedy(error: BaseException) -> str:
    """What to do about an error of storage, network or a service."""
    links = list(causes(error))
    statuses = {status(link) for link in links}
    errnos = {link.errno for link in links if isinstance(link, OSError)}
    if is_transient(error):
        return "check the storage or the network; another attempt may succeed"
    if _any(links, InvalidResponse):
        return "check the address, and the server or a proxy in front of it"
    if lacks_credentials(error):
        return "set or renew the client's credentials"
    if 403 in statuses or errnos & {errno.EACCES, errno.EPERM} or _any(links, PermissionError):
        return "check the permissions, or your credentials"
    if any(isinstance(link, socket.gaierror) for link in links):
        return "no such host; check the address"
    if any(isinstance(link, ssl.SSLError) for link in links):
        return "check the address and this machine's certificates"
    if is_missing(error):
        return "check the path"
    if any("Redirect" in type(link).__name__ for link in links) or statuses & {301, 302, 303, 307, 308}:
        return "check the address or endpoint, and its region"
    if 400 in statuses:  # S3's response to a HEAD request with an expired token
        return "check the address, its region and your credentials, which may have expired"
    if statuses & {507} or errnos & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free disk space, or raise the quota"
    if errnos & {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}:
        return "move what is in its place, or name another path"
    if errno.EROFS in errnos:
        return "name a folder that can be written"
    if errnos & {errno.EMFILE, errno.ENFILE}:
        return "raise the limit of open files (ulimit -n)"
    return "check the address and the storage"


def _any(links: list[BaseException], kind: type[BaseException]) -> bool:
    return any(isinstance(link, kind) for link in links)


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _retry_after_s(error: BaseException) -> float:
    """Seconds to wait by the server's Retry-After header, 0 without one."""
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        else:
            headers = getattr(response, "headers", None) or getattr(link, "headers", None)
        if not isinstance(headers, Mapping):
            continue
        for name, value in headers.items():
            if str(name).lower() == "retry-after":
                return _seconds(str(value))
    return 0.0


def _seconds(value: str) -> float:
    """Seconds until a Retry-After header's value, a number or a date (RFC 9110); 0 when it is neither."""
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (when - datetime.now(when.tzinfo or timezone.utc)).total_seconds())
