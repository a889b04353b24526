"""Transient and permanent errors, as raised by the installed clients."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import http.client
import logging
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import urllib.error
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import aiohttp
import botocore.exceptions
import huggingface_hub.errors
import pytest
import requests
import s3fs.errors
import urllib3.exceptions
import yarl
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.http_exceptions import BadStatusLine
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.utils import FileExpired

from bifrost.data import DataError, DataLost, retry
from bifrost.data.errors import InvalidResponse
from bifrost.data.retry import call, failure, is_transient, retrying


def raised(error: BaseException, cause: BaseException | None = None, context: BaseException | None = None):
    if cause:
        error.__cause__ = cause
    error.__context__ = context
    return error


def os_error(number: int) -> OSError:
    return OSError(number, "text")


def client(code: str, status: int) -> botocore.exceptions.ClientError:
    response = {"Error": {"Code": code, "Message": "…"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "GetObject")  # pyright: ignore


def http_answer(status: int, headers: dict[str, str] | None = None) -> aiohttp.ClientResponseError:
    url = yarl.URL("http://h/x.tar")
    asked = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(asked, (), status=status, message="m", headers=CIMultiDict(headers or {}))


def requests_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("m", response=response)


def connector(error: OSError) -> aiohttp.ClientConnectorError:
    key = ConnectionKey("h", 1, False, True, None, None, None)
    return aiohttp.ClientConnectorError(key, error)


class HttpError(Exception):  # as in gcsfs, which is not installed
    def __init__(self, code: object) -> None:
        self.code = code


class Passing(ValueError):
    transient = True


TRANSIENT = [
    *(os_error(number) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET)),
    *(os_error(number) for number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EAGAIN, errno.EBUSY, errno.EPIPE)),
    TimeoutError(),
    asyncio.TimeoutError(),
    concurrent.futures.TimeoutError(),
    ConnectionResetError("reset"),
    http.client.IncompleteRead(b""),
    http.client.RemoteDisconnected(),
    subprocess.TimeoutExpired("squeue", 5),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
    *(http_answer(status) for status in (408, 425, 429, 500, 502, 503, 504, 520, 529)),
    requests_error(503),
    HttpError(502),
    HttpError("429"),
    urllib.error.HTTPError("http://h", 503, "m", {}, None),  # pyright: ignore
    urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "refused")),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ServerTimeoutError(),
    connector(os_error(errno.ECONNREFUSED)),
    raised(http_answer(400), cause=BadStatusLine("garbage")),
    client("SlowDown", 503),
    client("RequestTimeout", 400),
    client("InternalError", 500),
    *(client(code, 400) for code in ("SlowDown", "RequestTimeoutException", "ThrottledException")),
    *(client(code, 409) for code in ("OperationAborted", "ConditionalRequestConflict", "409")),
    InvalidResponse("other bytes"),
    raised(OSError("translated"), cause=InvalidResponse("other bytes")),
    s3fs.errors.translate_boto_error(client("SlowDown", 503)),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://h"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://h"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore.exceptions.FlexibleChecksumError(error_msg="m"),
    requests.ConnectionError(urllib3.exceptions.ProtocolError("aborted", http.client.RemoteDisconnected())),
    requests.ReadTimeout(),
    requests.exceptions.ChunkedEncodingError(),
    urllib3.exceptions.ProtocolError("cut"),
    # Exceptions in which fsspec's HTTP files, transformers and the hub client wrap other errors:
    raised(FileNotFoundError("http://h/x.tar"), cause=connector(os_error(errno.ECONNREFUSED))),
    raised(FileNotFoundError("http://h/x.tar"), cause=http_answer(503)),
    raised(
        OSError("We couldn't connect"),
        cause=raised(huggingface_hub.errors.LocalEntryNotFoundError("none"), cause=requests.ReadTimeout()),
    ),
    raised(RuntimeError("in a worker"), context=os_error(errno.ESTALE)),
    sqlite3.OperationalError("database is locked"),
    Passing("a run's storage"),
    DataLost("x"),
]
LASTING = [
    *(os_error(number) for number in (errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EROFS, errno.EDQUOT)),
    *(os_error(number) for number in (errno.EINVAL, errno.EMFILE, errno.EPERM)),
    FileNotFoundError("no number"),
    PermissionError("no number"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    connector(socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
    ssl.SSLCertVerificationError(1, "certificate verify failed"),
    raised(requests.exceptions.SSLError("m"), cause=ssl.SSLCertVerificationError(1, "certificate verify failed")),
    *(http_answer(status) for status in (400, 401, 403, 404, 410, 416, 501, 507)),
    requests_error(404),
    HttpError(403),
    client("AccessDenied", 403),
    client("ExpiredToken", 400),
    client("400", 400),  # response to a HEAD, usually with an expired token
    client("BucketNotEmpty", 409),
    http_answer(409),
    aiohttp.TooManyRedirects(http_answer(302).request_info, (), status=302),
    raised(botocore.exceptions.HTTPClientError(error="…"), context=aiohttp.NonHttpUrlRedirectClientError("ftp://h/x")),
    raised(FileNotFoundError("http://h/x.tar"), cause=aiohttp.InvalidUrlRedirectClientError("x")),
    InvalidResponse("known", lasting=True),
    s3fs.errors.translate_boto_error(client("ExpiredTokenException", 400)),  # s3fs makes it an EIO
    s3fs.errors.translate_boto_error(client("NoSuchKey", 404)),
    FileExpired("x", "etag"),  # s3fs makes it an EBUSY
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.PartialCredentialsError(provider="env", cred_var="secret"),
    botocore.exceptions.SSLError(endpoint_url="https://h", error="m"),
    huggingface_hub.errors.OfflineModeIsEnabled("offline"),
    huggingface_hub.errors.LocalEntryNotFoundError("offline"),
    requests.exceptions.InvalidURL("x"),
    sqlite3.OperationalError("no such table"),
    ValueError("a bug"),
    KeyError("a bug"),
    MemoryError(),
    DataError("x"),
    raised(DataError("verdict"), cause=os_error(errno.EIO)),
    raised(ValueError("handled, then this"), context=KeyError("x")),
]


def shown(error: BaseException) -> str:
    return f"{type(error).__name__}-{error}"[:60]


@pytest.mark.parametrize("error", TRANSIENT, ids=shown)
def test_transient(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=shown)
def test_lasting(error: BaseException) -> None:
    assert not is_transient(error)


def test_suppressed_contexts_and_cycles() -> None:
    error = ValueError("x")
    error.__context__, error.__suppress_context__ = os_error(errno.EIO), True
    assert not is_transient(error)
    error = RuntimeError("x")
    error.__context__ = RuntimeError("y")
    error.__context__.__context__ = error
    assert not is_transient(error)


def test_groups() -> None:
    class Group(Exception):  # like ExceptionGroup, which Python 3.10 lacks
        def __init__(self, *exceptions: Exception) -> None:
            self.exceptions = exceptions

    assert is_transient(Group(KeyError("x"), os_error(errno.ESTALE)))
    assert not is_transient(Group(KeyError("x")))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses in seconds, which are recorded instead of waited for."""
    made: list[float] = []
    monkeypatch.setattr(retry, "_sleep", made.append)
    return made


class Action:
    """Raises each of the errors in turn, then returns "done"."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_retries_until_success(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    action = Action(os_error(errno.EIO), TimeoutError(), http_answer(503))
    with caplog.at_level(logging.WARNING):
        assert call(action, "s3://bucket/x.tar") == "done"
    assert action.calls == 4 and len(pauses) == 3
    assert pauses[0] < pauses[1] < pauses[2]
    (record,) = caplog.records
    assert "s3://bucket/x.tar: text; retrying for up to 10 s" in record.getMessage()


def test_error_after_retries_has_cause_and_place(pauses: list[float]) -> None:
    action = Action(*(os_error(errno.ESTALE) for _ in range(50)))
    with pytest.raises(DataLost, match=r"^x\.tar: text; check the storage or the network") as caught:
        call(action, "x.tar")
    assert sum(pauses) == pytest.approx(10)
    assert 4 <= action.calls <= 8
    assert isinstance(caught.value.__cause__, OSError)
    pauses.clear()
    with pytest.raises(OSError, match="text"):
        retrying(Action(*(os_error(errno.ESTALE) for _ in range(50))), "x", patience_s=300)
    assert sum(pauses) == pytest.approx(300)
    assert max(pauses) <= retry.LONGEST_PAUSE_S * 1.25


def test_only_wrong_responses_are_permanent(pauses: list[float]) -> None:
    """Retried like other errors, but not a reason to restart the job, unless a network error occurred as well."""
    with pytest.raises(DataError, match=r"^x\.tar: wrong; check the address, and the server") as caught:
        call(action := Action(*(InvalidResponse("wrong") for _ in range(50))), "x.tar")
    assert not isinstance(caught.value, DataLost) and action.calls >= 4 and sum(pauses) == pytest.approx(10)
    with pytest.raises(DataLost):
        call(Action(os_error(errno.EIO), *(InvalidResponse("wrong") for _ in range(50))), "x.tar")
    assert call(Action(InvalidResponse("wrong"), os_error(errno.EIO)), "x.tar") == "done"


def test_permanent_errors_are_not_retried(pauses: list[float]) -> None:
    for error, line in [
        (os_error(errno.ENOSPC), "^x: text; free disk space, or raise the quota$"),
        (os_error(errno.EROFS), "^x: text; name a folder that can be written$"),
        (http_answer(404), "^x: 404.*; check the path$"),
        (http_answer(400), "credentials, which may have expired$"),
        (raised(FileNotFoundError("x"), http_answer(507)), "; free disk space, or raise the quota$"),
        (client("AccessDenied", 403), "^x: .*; check the permissions, or your credentials$"),
        (botocore.exceptions.NoCredentialsError(), "^x: Unable to locate credentials; set or renew the client's"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "no such host; check the address$"),
        (huggingface_hub.errors.OfflineModeIsEnabled("a\nb"), "^x: a b; check the address and the storage$"),
    ]:
        action = Action(error)
        with pytest.raises(DataError, match=line) as caught:
            call(action, "x")
        assert action.calls == 1 and not isinstance(caught.value, DataLost)
        assert "\n" not in str(caught.value)
    assert pauses == []


def test_bugs_and_own_errors_pass_through(pauses: list[float]) -> None:
    for error in (KeyError("x"), DataError("bad"), DataLost("retried where it arose")):
        action = Action(error)
        with pytest.raises(type(error)) as caught:
            call(action, "x")
        assert caught.value is error and action.calls == 1
    with pytest.raises(KeyboardInterrupt):
        call(Action(KeyboardInterrupt()), "x")  # pyright: ignore
    assert pauses == []


def test_retry_after(pauses: list[float]) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True)
    slow = client("SlowDown", 503)
    slow.response["ResponseMetadata"]["HTTPHeaders"] = {"retry-after": "3"}  # pyright: ignore
    for error, wished in [
        (http_answer(429, {"Retry-After": "7"}), 7),
        (http_answer(503, {"retry-after": "86400"}), 60),
        (http_answer(503, {"Retry-After": date}), 20),
        (slow, 3),
    ]:
        pauses.clear()
        assert call(Action(error), "x") == "done"
        assert pauses == [pytest.approx(wished, abs=1.5)]
    # Retry-After does not count as own pauses, and its total is limited.
    pauses.clear()
    action = Action(*(http_answer(503, {"Retry-After": "20"}) for _ in range(50)))
    with pytest.raises(DataLost):
        call(action, "x")
    assert action.calls >= 5 and 60 <= sum(pauses) <= 71 and pauses[:2] == [20, 20]
    pauses.clear()
    call(Action(http_answer(503, {"Retry-After": "soon"})), "x")
    assert pauses[0] < 1


def test_message_quotes_the_deciding_cause() -> None:
    wrapped = raised(FileNotFoundError("http://h/x.tar"), cause=connector(os_error(errno.ECONNREFUSED)))
    assert str(failure("http://h/x.tar", wrapped)).startswith("http://h/x.tar: text; check the storage")
    assert isinstance(failure("x", wrapped), DataLost)
    assert str(failure("x", asyncio.TimeoutError())).startswith("x: TimeoutError; ")


def test_long_texts_are_truncated() -> None:
    assert len(str(failure("x", OSError(errno.EIO, "page " * 1000)))) < 400


def test_real_requests(pauses: list[float]) -> None:
    """requests and urllib against a server that fails twice, and a closed port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    answers = [503, 429, 200, 403]

    def get() -> int:
        response = requests.get(url, timeout=5)
        response.raise_for_status()
        return response.status_code

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/x"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert call(get, url) == 200
        assert len(pauses) == 2
        with pytest.raises(DataError, match=r"403.*check the permissions"):
            call(get, url)
        server.shutdown()
    with pytest.raises(DataLost, match="check the storage or the network"):
        call(get, url)


def test_import_is_cheap() -> None:
    """Commands that use only Slurm or MLflow do not import torch or a storage client."""
    heavy = "{'torch', 'numpy', 'fsspec', 'aiohttp', 'botocore', 'requests'}"
    check = f"import sys, bifrost.data.retry; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
