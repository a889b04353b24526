"""Classification of errors of storage, network and services as transient or permanent.

Client errors are recognized by attribute, module and class name, so that no client has to be imported.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

from .error_tables import (
    CLASSES,
    CODELESS_CONFLICT,
    CREDENTIALS,
    ERRNOS,
    LASTING_SERVER_STATUSES,
    MLFLOW,
    PASSING_CODES,
    PASSING_SSL,
    REDIRECTS,
    REFUSED_CREDENTIALS,
    TRANSIENT_STATUSES,
)


def verdict(error: BaseException) -> bool | None:
    """Classify an error. True: transient, the same request may succeed later. False: permanent, something has to be
    changed first. None: not a known error of storage, network or a service.

    Searches causes, contexts, wrapped reasons and members of exception groups, outermost first. A server's status takes
    precedence over the errno a client derives from it, and that over the class: s3fs turns unknown statuses into EIO,
    fsspec's HTTP files turn every connection failure into FileNotFoundError.
    """
    return judged(error)[0]


def judged(error: BaseException) -> tuple[bool | None, BaseException]:
    """`verdict`, and the error among the causes that decided it."""
    chain = list(causes(error))
    for rule in (_own, _by_status, _by_misleading_class, _by_errno, _by_class, _by_kind):
        for link in chain:
            found = rule(link)
            if found is not None:
                return found, link
    return None, error


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all errors that it was raised from or wraps, outermost first, without duplicates."""
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        inner = [link.__cause__, None if link.__suppress_context__ else link.__context__]
        inner += [getattr(link, name, None) for name in ("reason", "os_error", "orig", "inner_exception")]
        inner += [*getattr(link, "exceptions", ()), *link.args]
        waiting += [one for one in inner if isinstance(one, BaseException)]


def status(error: BaseException) -> int | None:
    """The HTTP status of one error, ignoring its causes."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(found) if found else None
    if _module(error) == "aiohttp" and type(error.__cause__).__module__ == "aiohttp.http_exceptions":
        return None  # aiohttp's own 400 for an invalid HTTP response, not sent by the server
    found = getattr(response, "status_code", None) or getattr(response, "status", None)
    found = found or getattr(error, "status_code", None) or getattr(error, "status", None)
    if found is None and (type(error).__name__ in ("HttpError", "HTTPError") or _module(error) == "google"):
        found = getattr(error, "code", None)  # gcsfs, urllib, google
    if isinstance(found, int) or (isinstance(found, str) and found.isdigit()):
        return int(found) if 100 <= int(found) < 600 else None
    return None


def is_missing(error: BaseException) -> bool:
    """Whether an error means that the file or object does not exist, as opposed to being unreachable or in a missing
    bucket."""
    found, link = judged(error)
    if found is not False or _s3_code(link) == "NoSuchBucket":
        return False
    no_file = isinstance(link, FileNotFoundError) or (isinstance(link, OSError) and link.errno == errno.ENOENT)
    return no_file or status(link) in (404, 410)


def lacks_credentials(error: BaseException) -> bool:
    """Whether an error means that a client has no credentials, or that they were refused."""
    return any(
        _is_credentials_class(link) or _s3_code(link) in REFUSED_CREDENTIALS or status(link) == 401
        for link in causes(error)
    )


def _is_credentials_class(error: BaseException) -> bool:
    return any(cls.__name__ in CREDENTIALS.get(_root(cls), ()) for cls in type(error).__mro__)


def _s3_code(error: BaseException) -> str | None:
    """The S3 error code of a botocore error, empty if the response has none."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else None


def _own(error: BaseException) -> bool | None:
    """This package's errors carry their verdict."""
    if getattr(error, "lasting", None) is True:
        return False
    transient = getattr(error, "transient", None)
    return transient if isinstance(transient, bool) else None


def _by_status(error: BaseException) -> bool | None:
    if _is_credentials_class(error):
        return False
    code, found = _s3_code(error), status(error)
    if code in PASSING_CODES or (found == 409 and code in CODELESS_CONFLICT):
        return True
    if found is not None and found >= 400:
        return found in TRANSIENT_STATUSES or (found >= 500 and found not in LASTING_SERVER_STATUSES)
    if _module(error) == "mlflow":
        code = getattr(error, "error_code", None)
        if code == "INTERNAL_ERROR" and type(error).__name__ == "RestException":  # not a client's default
            return True
        return MLFLOW.get(str(code))
    return None


def _by_misleading_class(error: BaseException) -> bool | None:
    """Name resolution, redirects, certificates and databases: here the classes and errnos of the errors, or of those
    that wrap them, are misleading."""
    if _module(error) == "aiohttp" and any(cls.__name__ in REDIRECTS for cls in type(error).__mro__):
        return False
    if isinstance(error, socket.gaierror):
        # A resolver failure is transient. "No such name" is a definite answer, nearly always to a typo.
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, ssl.SSLError):
        cut = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLWantReadError, ssl.SSLWantWriteError))
        return cut or error.reason in PASSING_SSL
    if _module(error) == "sqlite3" and type(error).__name__ == "OperationalError":
        busy, locked = 5, 6
        code = getattr(error, "sqlite_errorcode", None)  # from Python 3.11 on
        if (code & 0xFF in (busy, locked)) if code else re.search("is locked|is busy", str(error)):
            return True
    if getattr(error, "connection_invalidated", False) and _module(error) == "sqlalchemy":
        return True
    return None


def _by_errno(error: BaseException) -> bool | None:
    rust = re.search(r"\(os error (\d+)\)", str(error))
    if rust and not isinstance(error, OSError):  # format of safetensors, tokenizers and hf_xet
        return ERRNOS.get(int(rust.group(1)))
    if not isinstance(error, OSError) or _module(error) == "s3fs":
        return None
    return ERRNOS.get(error.errno) if error.errno is not None else None


def _by_class(error: BaseException) -> bool | None:
    if "Certificate" in type(error).__name__:
        return False
    for cls in type(error).__mro__:
        known = CLASSES.get(_root(cls), {}).get(cls.__name__)
        if known is not None:
            return known
    return None


def _by_kind(error: BaseException) -> bool | None:
    """Fallback for OSError. Last, so that its causes are checked first: libraries wrap all kinds of errors in it."""
    return False if isinstance(error, OSError) else None


def _module(error: BaseException) -> str:
    return _root(type(error))


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]
