"""Opening a data set of 100,000 shards with and without a catalogue: time, memory, requests; plan and seek in it.

    .venv/bin/python docs/benchmarks/catalogue.py [--shards 100000] [--rounds 3] [--latency 0.03]

Writes headers of indexes and sparse files of the shards' sizes, no samples, and serves them on loopback as S3 and over
HTTP, each response `--latency` seconds late. Every opening is a process of its own, a rank of `ranks` whose other ranks
are assumed to find the same; with and without the catalogue alternate. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote
from xml.sax.saxutils import escape

SAMPLES = 10_000
POSITIONS = 1024
"""Samples per step of the measured plan."""
STORAGE = ("local", "S3", "HTTP")


def make(folder: Path, shards: int) -> None:
    """Indexes without lines for samples, and sparse tars."""
    draw = random.Random(0)
    for number in range(shards):
        size = 10240 * draw.randrange(80_000, 120_000)
        header = {"version": 1, "bytes": size, "sha256": hashlib.sha256(b"%d" % number).hexdigest(), "samples": SAMPLES}
        header |= {"captions": SAMPLES, "caption_chars": [10, 200, 100 * SAMPLES], "image_bytes": size * 9 // 10}
        name = folder / f"train-{number:06d}"
        name.with_suffix(".index.jsonl").write_text(json.dumps(header) + "\n")
        name.with_suffix(".tar").touch()
        os.truncate(name.with_suffix(".tar"), size)


class Server:
    """GET and HEAD of files in a folder, and S3's ListObjectsV2, in a thread; counts requests."""

    def __init__(self, folder: Path, latency: float) -> None:
        self.folder, self.latency = folder, latency
        self.names = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".catalogue"))
        self.requests = 0
        self.port = 0
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True).start()
        started.wait()

    async def _run(self, started: threading.Event) -> None:
        from aiohttp import web

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        started.set()
        await asyncio.Event().wait()

    async def _answer(self, request):
        from aiohttp import web

        self.requests += 1
        await asyncio.sleep(self.latency)
        _, _, name = unquote(request.path).lstrip("/").partition("/")
        if "list-type" in request.query:
            return web.Response(text=self._list(request.query), content_type="application/xml")
        path = self.folder / name
        if not name or not path.is_file():
            return web.Response(status=404 if name else 200)
        size = path.stat().st_size
        headers = {"ETag": f'"{size:x}"', "Last-Modified": "Sun, 29 Nov 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(size)})
        span = request.http_range
        start, stop = span.start or 0, min(size, span.stop or size)
        with open(path, "rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return web.Response(status=206, headers=headers, body=body)

    def _list(self, query) -> str:
        from bisect import bisect_right

        after = query.get("continuation-token") or query.get("start-after", "")
        first = bisect_right(self.names, unquote(after))
        page = self.names[first : first + int(query.get("max-keys", 1000))]
        more = first + len(page) < len(self.names)
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>2026-11-29T00:00:00.000Z</LastModified>"
            f'<ETag>"{size:x}"</ETag><Size>{size}</Size></Contents>'
            for name in page
            for size in [(self.folder / name).stat().st_size]
        )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>bucket</Name><KeyCount>{len(page)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        )


def opened(spec: str, ranks: int, seek: bool) -> dict:
    """Open a data set as rank 0 of `ranks`; in this process, after the imports."""
    import numpy as np

    from bifrost.data import Plan, open_dataset

    for name in {"s3": ("aiobotocore.session", "s3fs"), "http": ("aiohttp",)}.get(spec.partition(":")[0], ()):
        import_module(name)
    imports = peak_mib()
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    dataset = open_dataset(spec, gather=lambda value: [value] * ranks)
    found = {"s": time.perf_counter() - begin, "fingerprint": dataset.fingerprint, "samples": len(dataset)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    found["cpu_s"] = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    found["imports_mib"], found["mib"] = imports, peak_mib()
    if seek:
        draw = np.random.default_rng(0)
        times = []
        for _ in range(20):
            start = int(draw.integers(100 * len(dataset)))
            begin, cpu = time.perf_counter(), time.process_time()
            plan = Plan(dataset.samples_per_shard, seed=0)
            plan.locate(np.arange(start, start + POSITIONS))
            times.append((time.perf_counter() - begin, time.process_time() - cpu))
        found["seek_ms"], found["seek_cpu_ms"] = ([1000 * each[side] for each in times] for side in (0, 1))
    return found


def peak_mib() -> float:
    """Peak RSS of this process; `ru_maxrss` would include that of the process that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measured(spec: str, ranks: int, seek: bool, server: Server) -> dict:
    before = server.requests
    endpoint = f"http://127.0.0.1:{server.port}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    ended = subprocess.run(
        [sys.executable, __file__, "--open", spec, "--ranks", str(ranks), *(["--seek"] if seek else [])],
        env={**os.environ, **keys, "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {**json.loads(ended.stdout), "requests": server.requests - before}


def shown(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def compare(folder: Path, server: Server, shards: int, rounds: int) -> None:
    from bifrost.data.catalogue import NAME

    braces = f"train-{{{0:06d}..{shards - 1:06d}}}.tar"
    places = {
        "local": f"{folder}/train-*.tar",
        "S3": "s3://bucket/train-*.tar",
        "HTTP": f"http://127.0.0.1:{server.port}/bucket/{braces}",
    }
    aside = folder.parent / NAME
    print(
        "| storage, ranks | catalogue | s | CPU s | peak MiB (imports) | requests |\n|---|---|---|---|---|---|",
        flush=True,
    )
    fingerprints, times = set(), []
    for storage, ranks in [(storage, ranks) for storage in STORAGE for ranks in (512, 1)]:
        found: dict[str, list[dict]] = {"with": [], "without": []}
        for _ in range(rounds):
            if ranks == 512 or storage == "local":  # a single rank would make 200,000 requests
                os.replace(folder / NAME, aside)
                try:
                    found["without"].append(measured(places[storage], ranks, False, server))
                finally:
                    os.replace(aside, folder / NAME)
            found["with"].append(measured(places[storage], ranks, storage == "local" and ranks == 512, server))
        times += [each for each in found["with"] if "seek_ms" in each]
        for how, results in found.items():
            if not results:
                continue
            # Each of 512 ranks is assumed to find the headers of rank 0, so without a catalogue there are fewer shards.
            fingerprints |= {each["fingerprint"] for each in results if how == "with" or ranks == 1}
            columns = [shown([each[name] for each in results], digits) for name, digits in (("s", 2), ("cpu_s", 2))]
            peak = f"{max(each['mib'] for each in results):,.0f} ({results[0]['imports_mib']:,.0f})"
            requests = max(each["requests"] for each in results) if storage != "local" else 0
            print(f"| {storage}, {ranks} | {how} | {' | '.join(columns)} | {peak} | {requests:,} |", flush=True)
    assert len(fingerprints) == 1, fingerprints
    seeks, cpu = ([value for each in times for value in each[name]] for name in ("seek_ms", "seek_cpu_ms"))
    print(f"\nplan and seek: {shown(seeks, 1)} ms, {shown(cpu, 1)} ms of CPU, at {len(seeks)} random positions")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each response")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seek", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.open:
        print(json.dumps(opened(asked.open, asked.ranks, asked.seek)))
        return
    from bifrost.data.make_catalogue import make_catalogues

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        make(folder, asked.shards)
        begin = time.perf_counter()
        (made,) = make_catalogues(str(folder))
        size = os.path.getsize(made.url) / 2**20
        print(f"catalogue of {asked.shards:,} shards: {size:.1f} MiB, written in {time.perf_counter() - begin:.1f} s\n")
        compare(folder, Server(folder, asked.latency), asked.shards, asked.rounds)


if __name__ == "__main__":
    main()
