"""Objects behind URLs, read by position: every answer is checked against what was asked.

fsspec finds the file system, the credentials and the connections. Its own reads hand back whatever body came, so HTTP
and S3 are asked through its sessions here, where the server's status and headers can be seen.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import tempfile
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import fsspec.config
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import url_to_fs

from .errors import DataError, WrongAnswer
from .transience import causes, status

log = logging.getLogger(__name__)

CONNECT_S, SILENCE_S = 10.0, 30.0
"""Until a connection stands; between two bytes of an answer."""
SLOWEST = 100_000
"""Bytes per second below which an answer counts as stalled."""
WHOLE_LIMIT = 4 << 30
"""Bytes of whole objects, from servers that ignore byte ranges, that one process keeps in its temporary folder."""
CHUNK = 1 << 20
LONGEST = 1 << 40
"""Bytes that no object read as a whole has."""


@dataclass(frozen=True)
class Answer:
    """What a server sent to one request."""

    body: bytes
    total: int | None = None
    """Bytes of the whole object, where the server states them."""
    tag: str | None = None
    """Strong ETag: it changes whenever the object does."""
    whole: _Kept | None = None
    """The whole object, when a part of it was asked for and the server ignored that."""


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it, of a path or URL; DataError when none can be used here.

    The clients' own retries and cached listings are switched off: `retry` alone asks again, so that patience is
    bounded, and what others write is seen.
    """
    try:
        fs, path = url_to_fs(url, **_settings(url))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}; check the address, or install the package that serves it") from None
    if _speaks(fs, "s3"):
        fs.retries = 1
        if fs.session is None:  # or else s3fs makes the same one with its client, which takes over no later handlers
            from aiobotocore.session import AioSession

            fs.session = AioSession(**fs.kwargs)
        fs.session.register("needs-retry.s3", _check_s3, unique_id="bifrost-check")
    return fs, path


def _settings(url: str) -> dict[str, Any]:
    scheme = url.partition("://")[0] if "://" in url else ""
    theirs = fsspec.config.conf.get(scheme, {})
    if scheme in ("s3", "s3a"):
        config = {"retries": {"total_max_attempts": 1}, **theirs.get("config_kwargs", {})}
        return {"use_listings_cache": False, "config_kwargs": config}
    if scheme in ("http", "https"):
        import aiohttp  # what fsspec reads HTTP with

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        return {"client_kwargs": {"timeout": timeout, **theirs.get("client_kwargs", {})}}
    return {}


def _check_s3(response: tuple[Any, dict] | None, operation: Any, **_: Any) -> None:
    """WrongAnswer for what botocore takes for an answer and is none.

    A redirect without a region has botocore ask HeadBucket for one, whose redirect it asks HeadBucket about, and so on
    until Python's recursion limit; others are passed on as results without their fields, as is a web page.
    """
    if response is None or response[0] is None:
        return
    status, parsed = response[0].status_code, response[1]
    headers = parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if 300 <= status < 400:
        region = "x-amz-bucket-region" in headers or "Region" in parsed.get("Error", {})
        if not region and (operation.name == "HeadBucket" or status not in (301, 302, 307)):
            raise WrongAnswer(f"the endpoint redirects (status {status}) and names no region", lasting=True)
    elif status < 300:
        missing = {
            "ListObjectsV2": parsed.keys().isdisjoint(("Name", "IsTruncated", "KeyCount", "MaxKeys", "Contents")),
            "HeadObject": "ContentLength" not in parsed,
            "GetObject": status not in (200, 206),
        }
        if missing.get(operation.name):
            kind = headers.get("content-type", "none")
            raise WrongAnswer(f"no answer of S3 to {operation.name} (status {status}, Content-Type {kind})")


def fetch(url: str, start: int, size: int) -> Answer:
    """`size` bytes of an object from `start` on, fewer where it ends.

    Raises whatever the client raises, WrongAnswer when the answer is not what was asked for or cut short, and
    FileNotFoundError when there is no such object.
    """
    if size == 0:
        return Answer(b"")
    fs, path = filesystem(url)
    if _speaks(fs, "http"):
        return _answered(sync(fs.loop, _over_http, fs, path, start, size))
    if _speaks(fs, "s3"):
        return _answered(sync(fs.loop, _from_s3, fs, path, start, size))
    total = fs.size(path)
    end = min(start + size, total)
    if start >= end:
        return Answer(b"", total)
    body = fs.cat_file(path, start=start, end=end)
    if len(body) == total != end - start:
        return Answer(b"", total, whole=_Kept(url, body))
    return Answer(_exact(body, end - start), total)


def _answered(answer: Answer | None) -> Answer:
    assert answer is not None, "fsspec's sync returns what the coroutine did"
    return answer


def read_start(url: str, limit: int = LONGEST) -> bytes:
    """The first `limit` bytes of an object, or all of a smaller one; raises like `fetch`. Asked for as a range, so that
    the answer states its end."""
    answer = fetch(url, 0, limit)
    if answer.whole is None:
        return answer.body
    with closing(answer.whole):
        _require(answer.whole, answer.total or size_of(url))
        return answer.whole.read(0, min(limit, answer.whole.size))


def size_of(url: str) -> int | None:
    """Bytes of an object, None where the server does not state them; raises like `fetch`."""
    fs, path = filesystem(url)
    try:
        return fs.size(path)
    except Exception as error:
        if not _speaks(fs, "s3") or not any(status(link) == 400 for link in causes(error)):
            raise
    # S3's code, such as RequestTimeout or ExpiredToken, is in the body, and an answer to HEAD has none.
    answer = fetch(url, 0, 1)
    if answer.whole is not None:
        answer.whole.close()
    return answer.total


class RemoteFile:
    """One object, read by position. total: its size in bytes, as its index has it; None takes the server's word."""

    def __init__(self, url: str, total: int | None = None) -> None:
        self.url = url
        self.total = total
        self._tag: str | None = None
        self._whole: _Kept | None = None
        self._lock = threading.Lock()

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer only where the object ends. Raises like `fetch`, and DataError when the
        object was replaced since it was first read."""
        with self._lock:
            whole = self._whole
        if whole is None:
            answer = fetch(self.url, start, size)
            with self._lock:
                if answer.whole and answer.total is None:  # its end was the connection's
                    _require(answer.whole, self.total or size_of(self.url))
                self._same(answer)
                if answer.whole is None:
                    return self._complete(answer, start, size)
                if self._whole is None:
                    log.warning("%s: the server ignores byte ranges; the whole object is read and kept", self.url)
                    self._whole = answer.whole
                else:  # another thread was first
                    answer.whole.close()
                whole = self._whole
        return whole.read(start, size)

    def close(self) -> None:
        with self._lock:
            if self._whole is not None:
                self._whole.close()
                self._whole = None

    def _complete(self, answer: Answer, start: int, size: int) -> bytes:
        end = start + size if self.total is None else min(start + size, self.total)
        if len(answer.body) < end - start and self.total is not None:
            raise WrongAnswer(f"{len(answer.body)} of {end - start} bytes came")
        return answer.body

    def _same(self, answer: Answer) -> None:
        if answer.total is not None:
            if self.total not in (None, answer.total):
                raise DataError(
                    f"{self.url}: {answer.total} bytes, expected {self.total}: it was replaced or cut; restore it, or"
                    " index it again"
                )
            self.total = answer.total
        if answer.tag is not None:
            if self._tag not in (None, answer.tag):
                raise DataError(
                    f"{self.url}: it was replaced while it was read (ETag {self._tag}, now {answer.tag}); restore it,"
                    " or index it again"
                )
            self._tag = answer.tag


async def _over_http(fs: Any, url: str, start: int, size: int) -> Answer:
    session = await fs.set_session()
    headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={start}-{start + size - 1}"
    async with session.get(fs.encode_url(url), **{**fs.kwargs, "headers": headers}) as response:
        tag = _strong(response.headers.get("ETag"))
        if response.status == 416:
            total = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
            return Answer(b"", int(total.group(1)) if total else None, tag)
        if response.status in (404, 410):
            raise FileNotFoundError(url)
        response.raise_for_status()
        if response.status not in (200, 203, 206):  # a redirect without an address, or no content
            redirects = 300 <= response.status < 400
            what = "redirects without an address" if redirects else "sent no file"
            raise WrongAnswer(f"the server {what} (status {response.status})", lasting=redirects)
        if response.status == 206:
            body = await asyncio.wait_for(response.read(), 60 + (response.content_length or 0) / SLOWEST)
            return _part(body, response.headers.get("Content-Range"), start, size, tag)
        # aiohttp unpacks what a server compresses all the same; the length stated is then that of the packed bytes.
        length = None if "Content-Encoding" in response.headers else response.content_length
        kept = _Kept(url)
        try:
            async for chunk in response.content.iter_chunked(CHUNK):
                kept.write(chunk)
            if length not in (None, kept.size):
                raise WrongAnswer(f"{kept.size} of {length} bytes came")
            _refuse_page(response.headers.get("Content-Type"), kept.read(0, 64))
        except BaseException:
            kept.close()
            raise
        return Answer(b"", length, tag, kept)


async def _from_s3(fs: Any, path: str, start: int, size: int) -> Answer:
    bucket, key, version = fs.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{start + size - 1}"}
    if version:
        asked["VersionId"] = version
    try:
        answer = await fs._call_s3("get_object", **asked)
    except Exception as error:
        if any(status(link) == 416 for link in causes(error)):
            return Answer(b"")
        raise
    async with answer["Body"] as stream:
        body = await asyncio.wait_for(stream.read(), 60 + answer.get("ContentLength", 0) / SLOWEST)
    _exact(body, answer.get("ContentLength"))
    tag = _strong(answer.get("ETag"))
    if "ContentRange" in answer:
        return _part(body, answer["ContentRange"], start, size, tag)
    _refuse_page(answer.get("ContentType"), body[:64])
    return Answer(b"", answer.get("ContentLength"), tag, _Kept(path, body))


def _part(body: bytes, content_range: str | None, start: int, size: int, tag: str | None) -> Answer:
    """The answer to a range, when it is the range that was asked for."""
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", (content_range or "").strip())
    if stated is None:
        raise WrongAnswer(f"a part came without its range (Content-Range {content_range})")
    first, last = int(stated.group(1)), int(stated.group(2))
    total = None if stated.group(3) == "*" else int(stated.group(3))
    end = start + size if total is None else min(start + size, total)
    if first != start or last + 1 > end or (total is not None and last + 1 != end):
        raise WrongAnswer(f"bytes {first} to {last} came, asked for {start} to {end - 1}")
    return Answer(_exact(body, last + 1 - first), total, tag)


def _refuse_page(content_type: str | None, start: bytes) -> None:
    """WrongAnswer for a web page, such as that of a login, with the status of a file. Some servers call all files of
    types that they do not know HTML; neither a tar nor an index begins like it."""
    if (content_type or "").lower().startswith("text/html") and start.lstrip().startswith(b"<"):
        raise WrongAnswer("a web page came in place of the file")


def _exact(body: bytes, length: int | None) -> bytes:
    if length is not None and len(body) != length:
        raise WrongAnswer(f"{len(body)} of {length} bytes came")
    return body


def _require(whole: _Kept, size: int | None) -> None:
    if size not in (None, whole.size):
        came = whole.size
        whole.close()
        raise WrongAnswer(f"{came} of {size} bytes came")


def _strong(tag: str | None) -> str | None:
    """An ETag that names exact bytes."""
    return None if not tag or tag.startswith("W/") else tag


def _speaks(fs: Any, protocol: str) -> bool:
    protocols = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return protocol in protocols and isinstance(fs, AsyncFileSystem)


class _Kept:
    """A whole object in an unnamed temporary file, of which one process holds at most WHOLE_LIMIT bytes in all."""

    _lock = threading.Lock()
    _in_all = 0

    def __init__(self, url: str, body: bytes = b"") -> None:
        self.url = url
        self.size = 0
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed by `close`
        if body:
            self.write(body)

    def write(self, chunk: bytes) -> None:
        with _Kept._lock:
            _Kept._in_all += len(chunk)
            self.size += len(chunk)
            full = _Kept._in_all > WHOLE_LIMIT
        if full:
            self.close()
            raise DataError(
                f"{self.url}: the server ignores byte ranges, and whole shards of more than"
                f" {WHOLE_LIMIT / 2**30:.3g} GiB are not kept; serve them from a server with byte ranges or from"
                " S3, or copy them"
            )
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) :]

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, start)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        with _Kept._lock:
            _Kept._in_all -= self.size
            self.size = 0
        self._file.close()
