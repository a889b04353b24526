"""A web server on loopback that serves a folder or proxies another server, with injected faults.

Every fault is bounded: a rule fires a given number of times. Responses have the headers of a correct server (ETag,
Content-Range), so that a client can detect the faulty ones.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "429", "500", "reset", "cut", "cut-unstated", "ignore-range", "wrong-range", "slow", "short-206")
"""The transient faults. A rule may also have another status, such as 403; a status with an S3 error code for the body,
such as "400 SlowDown"; "redirect", with or without an address; "page", a web page with status 200; or "empty", an empty
body with status 200."""
FAULTS_MEAN = """503, 429, 500: the status, 429 with Retry-After. reset: the connection ends before a response. cut: a
truncated body. cut-unstated: the same without a Content-Length. ignore-range: the whole file with status 200.
wrong-range: another range than requested, as stated in Content-Range. short-206: a shorter range than requested, as
stated. slow: a late response.
"""


@dataclass
class Rule:
    """Fires `times` times on requests whose path matches `path`."""

    fault: str
    path: str = ""
    times: float = 1
    """math.inf: always."""


@dataclass
class Plan:
    """The faults of a server."""

    rules: list[Rule] = field(default_factory=list)
    chance: float = 0.0
    """Probability of a random fault per request, with at most `in_a_row` consecutive ones on equal requests."""
    in_a_row: int = 2
    faults: tuple[str, ...] = FAULTS
    seed: int = 0
    ranges: bool = True
    """Whether the server supports range requests."""
    packed: bool = False
    """Whether whole files are sent gzip-compressed without being requested."""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.random = random.Random(self.seed)
        self.running: Counter[str] = Counter()
        self.fired: Counter[str] = Counter()
        self.asked: list[tuple[str, str, str | None]] = []
        """Method, path and Range of every request."""

    def next(self, method: str, path: str, asked_range: str | None) -> str | None:
        """The fault of this request, if any."""
        request = f"{method} {path} {asked_range}"
        with self.lock:
            self.asked.append((method, path, asked_range))
            fault = None
            for rule in self.rules:
                if rule.times and re.search(rule.path, path):
                    rule.times -= 1
                    fault = rule.fault
                    break
            else:
                if self.chance and self.running[request] < self.in_a_row and self.random.random() < self.chance:
                    fault = self.random.choice(self.faults)
            self.running[request] = self.running[request] + 1 if fault else 0
            if fault:
                self.fired[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def _any(self) -> None:
        fault = self.server.plan.next(self.command, self.path, self.headers.get("Range"))
        length = int(self.headers.get("Content-Length", 0))
        sent = self.rfile.read(length) if length else b""
        if fault == "slow":
            time.sleep(0.1)
        elif fault and fault[:3].isdigit():
            status, _, code = fault.partition(" ")
            body = f"<Error><Code>{code}</Code><Message>m</Message></Error>" if code else "<html>no</html>"
            body = "" if status == "204" else body
            self._answer(int(status), {"Retry-After": "1"} if fault == "429" else {}, body.encode())
            return
        elif fault in ("page", "empty"):
            self._answer(200, {"Content-Type": "text/html"}, b"<html>log in</html>" if fault == "page" else b"")
            return
        elif fault and fault.startswith("redirect"):
            to = fault.partition(" ")[2]
            self._answer(302, {"Location": self.path if to == "self" else to} if to else {}, b"")
            return
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
            return
        status, headers, body = self.server.source(self, sent, fault)
        if fault in ("cut", "cut-unstated") and self.command == "GET" and len(body) > 1:
            self._answer(status, headers, body, cut=True, stated=fault == "cut")
            return
        self._answer(status, headers, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, cut: bool = False, stated: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and stated:
            self.send_header("Content-Length", str(len(body)))
        if cut:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


Source = Callable[[_Handler, bytes, "str | None"], tuple[int, dict[str, str], bytes]]
"""(request, its body, fault of this request) -> status, headers, body."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    plan: Plan
    source: Source

    def handle_error(self, *_: object) -> None:
        pass


def _folder(folder: Path) -> Source:
    def answer(handler: _Handler, sent: bytes, fault: str | None) -> tuple[int, dict[str, str], bytes]:
        if handler.command not in ("GET", "HEAD"):
            return 405, {}, b"a folder that is only read"
        path = folder / handler.path.lstrip("/").partition("?")[0]
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir())
            page = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode()
            return 200, {"Content-Type": "text/html"}, page
        if not path.is_file():
            return 404, {}, b"none"
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Content-Type": "application/x-tar"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if asked is None or fault == "ignore-range" or not handler.server.plan.ranges:
            if handler.server.plan.packed:
                return 200, {**headers, "Content-Encoding": "gzip"}, gzip.compress(data)
            return 200, headers, data
        first, last = int(asked.group(1)), min(int(asked.group(2)), len(data) - 1)
        if first >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        if fault == "wrong-range":
            first = first + 512 if first + 512 <= last else max(0, first - 512)
        if fault == "short-206":
            last = (first + last) // 2
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, headers, data[first : last + 1]

    return answer


def _proxy(host: str, port: int) -> Source:
    def answer(handler: _Handler, sent: bytes, fault: str | None) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "connection"}
        if fault == "ignore-range":
            headers.pop("Range", None)
        if fault in ("wrong-range", "short-206") and (
            asked := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        ):
            first, last = int(asked.group(1)), int(asked.group(2))
            first, last = (first, (first + last) // 2) if fault == "short-206" else (max(0, first - 512), last)
            headers["Range"] = f"bytes={first}-{last}"
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            connection.request(handler.command, handler.path, sent or None, headers)
            response = connection.getresponse()
            body = response.read()
            kept = {
                name: value
                for name, value in response.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "server", "date")
                and (name.lower() != "content-length" or handler.command == "HEAD")
            }
            return response.status, kept, body
        finally:
            connection.close()

    return answer


@contextlib.contextmanager
def serving(source: Path | str | Source, plan: Plan | None = None, port: int = 0) -> Iterator[tuple[str, Plan]]:
    """Serve a folder, the responses of a function, or as a proxy the server at `http://host:port`; yields the address
    and the plan."""
    plan = plan or Plan()
    server = _Server(("127.0.0.1", port), _Handler)
    server.plan = plan
    if isinstance(source, Path):
        server.source = _folder(source)
    elif callable(source):
        server.source = source
    else:
        host, _, number = source.removeprefix("http://").partition(":")
        server.source = _proxy(host, int(number))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", plan
    finally:
        server.shutdown()
        server.server_close()
