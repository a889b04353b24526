"""Which errors of storage, network and services pass by themselves: one classification for everything that leaves the
process.

Clients' errors are known by attribute, module and class name, so that none of the clients is imported.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

TRANSIENT_STATUSES = {408, 425, 429}
"""HTTP statuses below 500 after which the same request may succeed."""
LASTING_SERVER_STATUSES = {501, 505, 507, 510, 511}
"""HTTP statuses of a server that no repetition changes: not implemented, disk full, a login page."""

_PASSING_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # "retry the request", S3's list of errors says, as for OperationAborted
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
"""S3's own error codes, some of which arrive with a status of 400 or 409: those that botocore's standard retry mode
(botocore.retries.standard) and S3's list of errors (API reference, Error responses) call retryable."""
_CODELESS_CONFLICT = {"", "409", "Conflict"}
"""Codes that botocore invents for a 409 without a body, as every answer to a HEAD is. Of S3's conflicts only those with
another request, which passes, can meet one that reads; s3fs likewise takes it for EBUSY. A 400 without a body stays
lasting, since it mostly stands for an expired token or another region: `remote.size_of` asks for its code by a GET."""
_REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
}
_REDIRECTS = {"NonHttpUrlClientError", "RedirectClientError", "TooManyRedirects"}
"""aiohttp's errors of a redirect that leads nowhere, which botocore wraps like a broken connection."""

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
        "BadHttpMessage": True,  # what a failing proxy sends
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
        "FlexibleChecksumError": True,  # the body was cut or altered on its way
        "HTTPClientError": True,
        "IncompleteReadError": True,
        "ResponseParserError": True,  # a limiting server's answer may be no XML
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
    """True: the same request may succeed later. False: somebody has to change something first. None: no error of
    storage, network or a service, as far as this can tell.

    Causes, contexts, the reasons that clients wrap and the members of groups are searched, outermost first. A server's
    status outranks what a client made of it, and that outranks a bare class: s3fs turns every status it does not know
    into EIO, fsspec's HTTP files turn every failure to connect into FileNotFoundError.
    """
    return judged(error)[0]


def judged(error: BaseException) -> tuple[bool | None, BaseException]:
    """`verdict`, and the error among the causes that it rests on."""
    chain = list(causes(error))
    for rule in (_own, _by_status, _by_misleading_class, _by_errno, _by_class, _by_kind):
        for link in chain:
            found = rule(link)
            if found is not None:
                return found, link
    return None, error


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything that it was raised from or wraps, outermost first, each once."""
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
    """The HTTP status that one error (not its causes) carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return int(found) if found else None
    if _module(error) == "aiohttp" and type(error.__cause__).__module__ == "aiohttp.http_exceptions":
        return None  # its 400 for an answer that is no HTTP was never sent by the server
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
    """Whether an error says that there is no such file or object, and not merely that it could not be reached, nor that
    there is no such bucket, where whatever is asked for is missing."""
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
    """Whether an error says that a client has no credentials, or that they were refused."""
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
    """Our own errors carry their verdict."""
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
        if code == "INTERNAL_ERROR" and type(error).__name__ == "RestException":  # a server's, not a client's default
            return True
        return _MLFLOW.get(str(code))
    return None


def _by_misleading_class(error: BaseException) -> bool | None:
    """Names that do not resolve, redirects, certificates, and the databases' errors: their classes and errnos, or those
    of what wraps them, would mislead."""
    if _module(error) == "aiohttp" and any(cls.__name__ in _REDIRECTS for cls in type(error).__mro__):
        return False
    if isinstance(error, socket.gaierror):
        # The resolver that gives no answer may give one later. "No such name" is an answer, nearly always to a typo.
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
    if rust and not isinstance(error, OSError):  # how safetensors, tokenizers and hf_xet quote one
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
    """The last word, so that what an error was raised from speaks first: libraries wrap whatever happened in these."""
    return False if isinstance(error, OSError) else None


def _module(error: BaseException) -> str:
    return _root(type(error))


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]
