"""Local shards behind an HTTP server on loopback that answers after a given latency."""

from __future__ import annotations

import asyncio
import mmap
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context

from ...data.index import index_path
from ...data.processes import die_with_launcher
from ..errors import RunError

CHUNK = 256 << 10


def latency_seconds(text: str) -> float:
    """Seconds of a latency such as `30ms`, `0.1s` or `0`; RunError for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.replace(" ", "")) or re.fullmatch(r"(0)()", text)
    if found is None:
        raise RunError(f"--latency {text}: give a time with its unit, such as 30ms")
    return float(found[1]) * (0.001 if found[2] == "ms" else 1)


@contextmanager
def served(shards: Sequence[str], latency_s: float) -> Iterator[list[str]]:
    """URLs of local shards, each with its index next to it, while a process serves them.

    The process supports byte ranges, and begins every response `latency_s` seconds after its request.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        port = listening.getsockname()[1]
        server = get_context("fork").Process(target=_serve, args=(listening, list(shards), latency_s), daemon=True)
        server.start()
    try:
        yield [f"http://127.0.0.1:{port}/{number:05d}.tar" for number in range(len(shards))]
    finally:
        server.kill()
        server.join()


def _serve(listening: socket.socket, shards: list[str], latency_s: float) -> None:
    from aiohttp import web

    die_with_launcher()
    files = {f"/{number:05d}.tar": shard for number, shard in enumerate(shards)}
    files |= {index_path(name): index_path(shard) for name, shard in files.items()}
    contents = {name: memoryview(_mapped(path)) for name, path in files.items()}

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path not in contents:
            raise web.HTTPNotFound
        await asyncio.sleep(latency_s)
        whole, asked = contents[request.path], request.http_range
        start, stop, _ = asked.indices(len(whole))
        response = web.StreamResponse()
        if asked != slice(None, None, 1):
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
        response.content_length = stop - start
        await response.prepare(request)
        if request.method == "GET":
            with suppress(ConnectionError):  # a reader that was closed
                for at in range(start, stop, CHUNK):  # by `write`, which costs less than aiohttp's FileResponse
                    await response.write(whole[at : min(at + CHUNK, stop)])
        return response

    app = web.Application()
    app.router.add_get("/{name}", answer)
    web.run_app(app, sock=listening, access_log=None, print=None, loop=asyncio.new_event_loop())


def _mapped(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
