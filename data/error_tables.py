"""Codes, statuses and classes of storage's, the network's and services' errors, and whether each passes by itself."""

from __future__ import annotations

import errno

TRANSIENT_STATUSES = {408, 425, 429}
"""HTTP statuses below 500 after which the same request may succeed later."""
LASTING_SERVER_STATUSES = {501, 505, 507, 510, 511}
"""HTTP server errors that a retry does not fix: not implemented, disk full, login required."""

PASSING_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # "retry the request" in S3's list of errors, as for OperationAborted
    "IncompleteBody",
    "InternalError",
    "InternalFailure",
    "LimitExceededException",
    "NoSuchUpload",  # of a file in parts, also if it was completed and the response lost: it is sent again
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
CODELESS_CONFLICT = {"", "409", "Conflict"}
"""Codes that botocore makes up for a 409 without a body, such as any response to a HEAD. For a read, the only possible
S3 conflict is with a concurrent request, which is transient; s3fs likewise maps it to EBUSY. A 400 without a body is
permanent, since it usually means an expired token or a wrong region: `remote.size_of` gets its code by a GET."""
REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "TokenRefreshRequired",
}
REDIRECTS = {"NonHttpUrlClientError", "RedirectClientError", "TooManyRedirects"}
"""aiohttp's errors for invalid redirects, which botocore wraps like a broken connection."""

ERRNOS = {
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

CREDENTIALS = {
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

HTTPX = {
    "TransportError": True,
    "NetworkError": True,
    "TimeoutException": True,
    "TooManyRedirects": False,
    "RemoteProtocolError": True,
    "LocalProtocolError": False,
    "UnsupportedProtocol": False,
}
CLASSES: dict[str, dict[str, bool]] = {
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
    "httpcore": HTTPX,
    "httpcore2": HTTPX,
    "httpx": HTTPX,
    "httpx2": HTTPX,
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

PASSING_SSL = {"BAD_RECORD_MAC", "DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "UNEXPECTED_EOF_WHILE_READING"}
MLFLOW = {
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
