"""Classification of errors of storage, network and services as transient or permanent.

Client errors are recognized by attribute, module and class name, so that no client has to be imported.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

TRANSIENT_STATUSES = {408, 425, 429}
"""HTTP statuses below 500 after which the same request may succeed later."""
LASTING_SERVER_STATUSES = {501, 505, 507, 510, 511}
"""HTTP server errors that a retry does not fix: not implemented, disk full, login required."""

_PASSING_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # "retry the request" in S3's list of errors, as for OperationAborted
    "IncompleteBody",
    "InternalError",
    "InternalFailure",
    "LimitExceededException",
    "OperationAborted",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
    "XAmzContentSHA256Mismatch",
}
"""S3 error codes, some of them with status 400 or 409, that botocore's standard retry mode (botocore.retries.standard)
or S3's list of errors (API reference, Error responses) describe as retryable."""
_CODELESS_CONFLICT = {"", "409", "Conflict"}
"""Codes that botocore makes up for a 409 without a body, such as any response to a HEAD. For a read, the only possible
S3 conflict is with a concurrent request, which is transient; s3fs likewise maps it to EBUSY. A 400 without a body is
permanent, since it usually means an expired token or a wrong region: `remote.size_of` gets its code by a GET."""
_REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
}
_REDIRECTS = {"NonHttpUrlClientError", "RedirectClientError", "TooManyRedirects"}
"""aiohttp's errors for invalid redirects, which botocore wraps like a broken connection."""

_ERRNOS = {
    **dict.fromkeys(
        (
            errno.EAGAIN,
            errno.EBUSY,  # s3fs: SlowDown and ServiceUnavailable; a network file system's renames
            errno.ECONNABORTED,
            errno.ECONNREFUSED,
            errno.ECONNRESET,
            errno.EHOSTDOWN,
            errno.EHOSTUNREACH,
            errno.EINTR,
            errno.EIO,
            errno.ENETDOWN,
            errno.ENETRESET,
            errno.ENETUNREACH,
            errno.ENOBUFS,
            errno.ENOTCONN,  # a FUSE mount whose server is being restarted
            errno.EPIPE,
            errno.EPROTO,
            errno.ESHUTDOWN,
            errno.ESTALE,
            errno.ETIMEDOUT,
            getattr(errno, "ECOMM", errno.EIO),
            getattr(errno, "ENOLINK", errno.EIO),
            getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: InternalError
        ),
        True,
    ),
    **dict.fromkeys(
        (
            errno.EACCES,
            errno.EDQUOT,
            errno.EEXIST,
            errno.EFBIG,
            errno.EINVAL,
            errno.EISDIR,
            errno.ELOOP,
            errno.EMFILE,
            errno.ENAMETOOLONG,
            errno.ENODEV,
            errno.ENOENT,
            errno.ENOSPC,
            errno.ENOSYS,
            errno.ENOTDIR,
            errno.ENOTEMPTY,
            errno.EOPNOTSUPP,
            errno.EPERM,
            errno.EROFS,
            errno.EXDEV,
            getattr(errno, "EKEYEXPIRED", errno.EACCES),  # a Kerberos ticket
        ),
        False,
    ),
}

_CREDENTIALS = {
    "botocore": {
        "CredentialRetrievalError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshWithMFAUnsupportedError",
        "SSOError",
        "TokenRetrievalError",
    },
    "google": {"DefaultCredentialsError", "RefreshError"},
    "azure": {"ClientAuthenticationError"},
    "huggingface_hub": {"GatedRepoError", "LocalTokenNotFoundError"},
}

_HTTPX = {
    "TransportError": True,
    "NetworkError": True,
    "TimeoutException": True,
    "TooManyRedirects": False,
    "RemoteProtocolError": True,
    "LocalProtocolError": False,
    "UnsupportedProtocol": False,
}
_CLASSES: dict[str, dict[str, bool]] = {
    "builtins": {
        "BlockingIOError": True,
        "ConnectionError": True,
        "InterruptedError": True,
        "TimeoutError": True,
    },
    "aiohttp": {
        "BadHttpMessage": True,  # sent by failing proxies
        "ClientConnectionError": True,
        "ClientConnectorSSLError": False,
        "ClientPayloadError": True,
        "InvalidURL": False,
        "PayloadEncodingError": True,
    },
    "asyncio": {"IncompleteReadError": True, "TimeoutError": True},
    "azure": {"ServiceRequestError": True, "ServiceResponseError": True},
    "botocore": {
        "BotoCoreError": False,
        "ChecksumError": True,
        "ConnectionError": True,
        "FlexibleChecksumError": True,  # the body was truncated or altered in transit
        "HTTPClientError": True,
        "IncompleteReadError": True,
        "ResponseParserError": True,  # the response of a server that limits requests may not be XML
        "SSLError": False,
    },
    "concurrent": {"TimeoutError": True},
    "fsspec": {"BlocksizeMismatchError": False, "FSTimeoutError": True},
    "gcsfs": {"ChecksumError": True},
    "google": {"TransportError": True},
    "http": {"BadStatusLine": True, "IncompleteRead": True, "RemoteDisconnected": True},
    "httpcore": _HTTPX,
    "httpcore2": _HTTPX,
    "httpx": _HTTPX,
    "httpx2": _HTTPX,
    "huggingface_hub": {"OfflineModeIsEnabled": False},
    "requests": {"ChunkedEncodingError": True, "ConnectionError": True, "SSLError": False, "Timeout": True},
    "s3fs": {"FileExpired": False},  # an EBUSY: the object was replaced
    "subprocess": {"TimeoutExpired": True},
    "urllib3": {
        "IncompleteRead": True,
        "InvalidChunkLength": True,
        "LocationValueError": False,
        "MaxRetryError": True,
        "NewConnectionError": True,
        "PoolError": True,
        "ProtocolError": True,
        "ProxyError": True,
        "SSLError": False,
        "TimeoutError": True,
    },
}

_PASSING_SSL = {"BAD_RECORD_MAC", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "UNEXPECTED_EOF_WHILE_READING"}
_MLFLOW = {
    "REQUEST_LIMIT_EXCEEDED": True,
    "RESOURCE_EXHAUSTED": True,
    "TEMPORARILY_UNAVAILABLE": True,
    "BAD_REQUEST": False,
    "CUSTOMER_UNAUTHORIZED": False,
    "ENDPOINT_NOT_FOUND": False,
    "INVALID_PARAMETER_VALUE": False,
    "INVALID_STATE": False,
    "PERMISSION_DENIED": False,
    "RESOURCE_ALREADY_EXISTS": False,
    "RESOURCE_DOES_NOT_EXIST": False,
    "UNAUTHENTICATED": False,
}


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
    if found is None and type(error).__name__ in ("HttpError", "HTTPError"):  # gcsfs, urllib
        found = getattr(error, "code", None)
    if found is None and _module(error) == "google":
        found = getattr(error, "code", None)
    if isinstance(found, int) or (isinstance(found, str) and found.isdigit()):
        return int(found) if 100 <= int(found) < 600 else None
    return None


def is_missing(error: BaseException) -> bool:
    """Whether an error means that the file or object does not exist, as opposed to being unreachable or in a missing
    bucket."""
    found, link = judged(error)
    response = getattr(link, "response", None)
    if found is not False or (isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket"):
        return False
    return (
        status(link) in (404, 410)
        or (isinstance(link, OSError) and link.errno == errno.ENOENT)
        or (isinstance(link, FileNotFoundError))
    )


def lacks_credentials(error: BaseException) -> bool:
    """Whether an error means that a client has no credentials, or that they were refused."""
    for link in causes(error):
        if any(cls.__name__ in _CREDENTIALS.get(_root(cls), ()) for cls in type(link).__mro__):
            return True
        response = getattr(link, "response", None)
        if isinstance(response, dict) and response.get("Error", {}).get("Code") in _REFUSED_CREDENTIALS:
            return True
        if status(link) == 401:
            return True
    return False


def _own(error: BaseException) -> bool | None:
    """This package's errors carry their verdict."""
    if getattr(error, "lasting", None) is True:
        return False
    passing = getattr(error, "passing", None)
    return passing if isinstance(passing, bool) else None


def _by_status(error: BaseException) -> bool | None:
    if any(cls.__name__ in _CREDENTIALS.get(_root(cls), ()) for cls in type(error).__mro__):
        return False
    response = getattr(error, "response", None)
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else None
    found = status(error)
    if code in _PASSING_CODES or (found == 409 and code in _CODELESS_CONFLICT):
        return True
    if found is not None and found >= 400:
        return found in TRANSIENT_STATUSES or (found >= 500 and found not in LASTING_SERVER_STATUSES)
    if _module(error) == "mlflow":
        code = getattr(error, "error_code", None)
        if code == "INTERNAL_ERROR" and type(error).__name__ == "RestException":  # not a client's default
            return True
        return _MLFLOW.get(str(code))
    return None


def _by_misleading_class(error: BaseException) -> bool | None:
    """Name resolution, redirects, certificates and databases: here the classes and errnos of the errors, or of those
    that wrap them, are misleading."""
    if _module(error) == "aiohttp" and any(cls.__name__ in _REDIRECTS for cls in type(error).__mro__):
        return False
    if isinstance(error, socket.gaierror):
        # A resolver failure is transient. "No such name" is a definite answer, nearly always to a typo.
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, ssl.SSLError):
        cut = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLWantReadError, ssl.SSLWantWriteError))
        return cut or error.reason in _PASSING_SSL
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
        return _ERRNOS.get(int(rust.group(1)))
    if not isinstance(error, OSError) or _module(error) == "s3fs":
        return None
    return _ERRNOS.get(error.errno) if error.errno is not None else None


def _by_class(error: BaseException) -> bool | None:
    if "Certificate" in type(error).__name__:
        return False
    for cls in type(error).__mro__:
        known = _CLASSES.get(_root(cls), {}).get(cls.__name__)
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
