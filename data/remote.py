"""Range reads of objects behind URLs; every response is checked against its request.

fsspec provides the file system, credentials and connections. Its own reads return whatever body was received, so HTTP
and S3 requests are made here through its sessions, with access to the status and headers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec.config
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.dirfs import DirFileSystem

from .errors import DataError, InvalidResponse
from .kept import Kept
from .transience import causes, status

CONNECT_S, SILENCE_S = 10.0, 30.0
"""Timeouts in seconds: to connect, and between two reads of a response."""
SLOWEST = 100_000
"""Bytes per second below which a response counts as stalled."""
CONNECTIONS = 32
"""Requests of a process at once: at a latency of 100 ms, 320 per second."""
CHUNK = 1 << 20
LONGEST = 1 << 40
"""Upper bound in bytes for an object that is read whole."""


@dataclass(frozen=True)
class Response:
    """A server's response to one request."""

    body: bytes
    total: int | None = None
    """Size of the whole object in bytes, if the server states it."""
    tag: str | None = None
    """Strong ETag, which changes whenever the object does."""
    whole: Kept | None = None
    """The whole object, when the server ignored the requested range."""


Fetch = Callable[[str, int, int], Response]
"""`fetch`, or another source of its responses."""


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a path or URL, and the path in it; raises DataError when there is none.

    The clients' own retries and cached listings are disabled: only `retry` retries, so that the total time is bounded,
    and objects written by others are seen.
    """
    try:
        fs, path = url_to_fs(url, **_settings(url))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; check the address, or install the package that serves it") from None
    if _has_protocol(fs, "s3"):
        fs.retries = 1
        if fs.session is None:  # s3fs would create it together with its client, which ignores handlers added later
            from aiobotocore.session import AioSession

            fs.session = AioSession(**fs.kwargs)
            fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
        fs.session.register("needs-retry.s3", _check_s3, unique_id="bifrost-check")
    return fs, path


def _settings(url: str) -> dict[str, Any]:
    scheme = url.partition("://")[0] if "://" in url else ""
    theirs = fsspec.config.conf.get(scheme, {})
    if scheme in ("s3", "s3a"):
        config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS}
        return {"use_listings_cache": False, "config_kwargs": {**config, **theirs.get("config_kwargs", {})}}
    if scheme in ("http", "https"):
        import aiohttp  # fsspec's HTTP client

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        return {"client_kwargs": {"timeout": timeout, **theirs.get("client_kwargs", {})}}
    return {}


def _timestamp(value: Any) -> datetime:
    """botocore's `parse_timestamp`, with which parsing a listing takes five times as long."""
    with suppress(ValueError):
        if str(value).endswith("Z"):
            return datetime.fromisoformat(f"{value[:-1]}+00:00")
    from botocore.utils import parse_timestamp

    return parse_timestamp(value)


def _check_s3(response: tuple[Any, dict] | None, operation: Any, **_: Any) -> None:
    """Raise InvalidResponse for invalid responses that botocore accepts.

    For a redirect without a region botocore calls HeadBucket, whose redirect makes it call HeadBucket again, up to
    Python's recursion limit; other redirects and web pages are returned as results without the expected fields.
    """
    if response is None or response[0] is None:
        return
    status, parsed = response[0].status_code, response[1]
    headers = parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if 300 <= status < 400:
        region = "x-amz-bucket-region" in headers or "Region" in parsed.get("Error", {})
        if not region and (operation.name == "HeadBucket" or status not in (301, 302, 307)):
            raise InvalidResponse(f"the endpoint redirects (status {status}) without naming a region", lasting=True)
    elif status < 300:
        missing = {
            "ListObjectsV2": parsed.keys().isdisjoint(("Name", "IsTruncated", "KeyCount", "MaxKeys", "Contents")),
            "HeadObject": "ContentLength" not in parsed,
            "GetObject": status not in (200, 206),
        }
        if missing.get(operation.name):
            kind = headers.get("content-type", "none")
            raise InvalidResponse(f"not an S3 response to {operation.name} (status {status}, Content-Type {kind})")


def fetch(url: str, start: int, size: int) -> Response:
    """Read `size` bytes of an object from offset `start`, fewer at its end.

    Raises whatever the client raises, InvalidResponse when the response does not match the request or is truncated, and
    FileNotFoundError when the object does not exist.
    """
    if size == 0:
        return Response(b"")
    fs, path = filesystem(url)
    if _has_coroutines(fs):
        response: Any = sync(fs.loop, _request, fs, path, start, size)
        return response
    total = fs.size(path)
    end = min(start + size, total)
    if start >= end:
        return Response(b"", total)
    return _of_bytes(fs.cat_file(path, start=start, end=end), url, start, end, total)


def request(url: str, start: int, size: int) -> Future[Response]:
    """`fetch` in the background, for an object of a file system that `has_requests`; the future raises what `fetch`
    raises, and cancelling it closes the connection."""
    fs, path = filesystem(url)

    async def run() -> Response:
        try:
            return await _request(fs, path, start, size)
        except asyncio.TimeoutError as error:
            raise FSTimeoutError from error  # as `sync` does

    return asyncio.run_coroutine_threadsafe(run(), fs.loop)


def has_requests(url: str) -> bool:
    """Whether objects of this file system can be requested in the background: HTTP, S3 and others whose fsspec driver
    is asynchronous."""
    return _has_coroutines(filesystem(url)[0])


def read_start(url: str, limit: int = LONGEST, get: Fetch = fetch) -> bytes:
    """The first `limit` bytes of an object, or all of a smaller one; raises like `fetch`. Uses a range request, so that
    the response states its end."""
    response = get(url, 0, limit)
    if response.whole is None:
        return response.body
    with closing(response.whole):
        check_size(response.whole.size, response.total or size_of(url))
        return response.whole.read(0, min(limit, response.whole.size))


def size_of(url: str) -> int | None:
    """Size of an object in bytes, None when the server does not state it; raises like `fetch`."""
    fs, path = filesystem(url)
    try:
        return fs.size(path)
    except Exception as error:
        if not _has_protocol(fs, "s3") or not any(status(link) == 400 for link in causes(error)):
            raise
    # S3's error code, such as RequestTimeout or ExpiredToken, is in the body, which a response to HEAD lacks.
    response = fetch(url, 0, 1)
    if response.whole is not None:
        response.whole.close()
    return response.total


@dataclass(frozen=True)
class Listed:
    """A file in a listing."""

    size: int
    tag: str


@dataclass(frozen=True)
class ListingPage:
    files: dict[str, Listed]
    """By name, in order; at most 1,000."""
    token: str | None
    """Requests the next page; None on the last one."""


def list_page(folder: str, after: str = "", token: str | None = None) -> ListingPage:
    """One request's part of the listing of a folder on S3, without its subfolders, from the first file whose name is
    greater than `after`; raises whatever the client raises."""
    fs, path = filesystem(folder)
    bucket, _, prefix = path.rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", "StartAfter": prefix + after}
    parsed = fs.call_s3("list_objects_v2", **asked, **({"ContinuationToken": token} if token else {}))
    files = {
        each["Key"].removeprefix(prefix): Listed(each["Size"], each["ETag"]) for each in parsed.get("Contents", ())
    }
    return ListingPage(files, parsed.get("NextContinuationToken") if parsed.get("IsTruncated") else None)


def protocol(fs: Any) -> str:
    """The first protocol of an fsspec file system: file, s3, http."""
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]


async def _request(fs: Any, path: str, start: int, size: int) -> Response:
    if _has_protocol(fs, "http"):
        return await _over_http(fs, path, start, size)
    if _has_protocol(fs, "s3"):
        return await _from_s3(fs, path, start, size)
    total = (await fs._info(path))["size"]
    end = min(start + size, total)
    if start >= end:
        return Response(b"", total)
    return _of_bytes(await fs._cat_file(path, start=start, end=end), fs.unstrip_protocol(path), start, end, total)


def _of_bytes(body: bytes, url: str, start: int, end: int, total: int) -> Response:
    """The response of a driver that returns bytes alone."""
    if len(body) == total != end - start:
        return Response(b"", total, whole=Kept(url, body))
    check_size(len(body), end - start)
    return Response(body, total)


async def _over_http(fs: Any, url: str, start: int, size: int) -> Response:
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{start + size - 1}"
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as response:
        tag = _strong(response.headers.get("ETag"))
        if response.status == 416:
            total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
            return Response(b"", int(total.group(1)) if total else None, tag)
        if response.status in (404, 410):
            raise FileNotFoundError(url)
        response.raise_for_status()
        if response.status not in (200, 203, 206):  # a redirect without an address, or no content
            redirects = 300 <= response.status < 400
            what = "redirects without an address" if redirects else "sent no file"
            raise InvalidResponse(f"the server {what} (status {response.status})", lasting=redirects)
        if response.status == 206:
            body = await asyncio.wait_for(response.read(), 60 + (response.content_length or 0) / SLOWEST)
            return _part(body, response.headers.get("Content-Range"), start, size, tag)
        # Some servers compress despite the header; aiohttp decompresses, and the stated length is the compressed one.
        length = None if "Content-Encoding" in response.headers else response.content_length
        kept = Kept(url)
        async for chunk in response.content.iter_chunked(CHUNK):
            kept.write(chunk)
        check_size(kept.size, length)
        _refuse_page(response.headers.get("Content-Type"), kept.read(0, 64))
        return Response(b"", length, tag, kept)


async def _from_s3(fs: Any, path: str, start: int, size: int) -> Response:
    bucket, key, version = fs.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{start + size - 1}"}
    if version:
        asked["VersionId"] = version
    try:
        response = await fs._call_s3("get_object", **asked)
    except Exception as error:
        if any(status(link) == 416 for link in causes(error)):
            return Response(b"")
        raise
    async with response["Body"] as stream:
        body = await asyncio.wait_for(stream.read(), 60 + response.get("ContentLength", 0) / SLOWEST)
    check_size(len(body), response.get("ContentLength"))
    tag = _strong(response.get("ETag"))
    if "ContentRange" in response:
        return _part(body, response["ContentRange"], start, size, tag)
    _refuse_page(response.get("ContentType"), body[:64])
    return Response(b"", response.get("ContentLength"), tag, Kept(path, body))


def _part(body: bytes, content_range: str | None, start: int, size: int, tag: str | None) -> Response:
    """The response to a range request; raises InvalidResponse when it is another range."""
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", (content_range or "").strip())
    if stated is None:
        raise InvalidResponse(f"partial content without a valid range (Content-Range {content_range})")
    first, last = int(stated.group(1)), int(stated.group(2))
    total = None if stated.group(3) == "*" else int(stated.group(3))
    end = start + size if total is None else min(start + size, total)
    if first != start or last + 1 > end or (total is not None and last + 1 != end):
        raise InvalidResponse(f"received bytes {first} to {last}, requested {start} to {end - 1}")
    check_size(len(body), last + 1 - first)
    return Response(body, total, tag)


def _refuse_page(content_type: str | None, start: bytes) -> None:
    """Raise InvalidResponse for a web page, such as a login page, with the status of a file. The start is checked
    because some servers send files of unknown types as HTML; neither a tar nor an index starts with `<`."""
    if (content_type or "").lower().startswith("text/html") and start.lstrip().startswith(b"<"):
        raise InvalidResponse("received a web page instead of the file")


def check_size(received: int, stated: int | None) -> None:
    if stated not in (None, received):
        raise InvalidResponse(f"received {received} of {stated} bytes")


def _strong(tag: str | None) -> str | None:
    """The ETag if it is a strong one, which identifies exact bytes."""
    return None if not tag or tag.startswith("W/") else tag


def _has_protocol(fs: Any, protocol: str) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return protocol in protocols and isinstance(fs, AsyncFileSystem)


def _has_coroutines(fs: Any) -> bool:
    # A DirFileSystem has coroutines even when the file system that it wraps has none.
    return isinstance(fs, AsyncFileSystem) and not isinstance(fs, DirFileSystem)
