#!/usr/bin/env bash
# s3fs 2026.9.0 returns the whole object for an empty range.
#
# A reader of shards or checkpoints that knows where each member is asks for its bytes by a range. Members of zero bytes
# are valid: an empty caption, a tensor without elements.
#
# Expected: `cat_file(path, start=n, end=n)` and `cat_ranges` return b"", as `open` and read, and fsspec's local and memory
# file systems do. Actual: every byte of the object, gigabytes of a large shard, in place of none.
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 'moto[server]==5.2.5'
cd "$folder"

AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_EC2_METADATA_DISABLED=true timeout 120 "$folder/venv/bin/python" - <<'PYTHON'
import logging
import os

from moto.server import ThreadedMotoServer

import fsspec
import s3fs

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
systems = {
    "s3fs": s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}"),
    "memory": fsspec.filesystem("memory"),
    "local": fsspec.filesystem("file"),
}
found = {}
for name, filesystem in systems.items():
    base = "shards" if name == "s3fs" else "/tmp/shards" if name == "memory" else f"{os.getcwd()}/shards"
    filesystem.mkdir(base)
    path = f"{base}/0.tar"
    filesystem.pipe(path, bytes(range(100)))
    found[name] = (
        len(filesystem.cat_file(path, start=7, end=7)),
        len(filesystem.cat_ranges([path, path], [7, 0], [7, 10])[0]),
    )
    print(f"{name}: cat_file of no bytes returns {found[name][0]}, cat_ranges {found[name][1]}")
server.stop()
raise SystemExit(found != {"s3fs": (100, 100), "memory": (0, 0), "local": (0, 0)})
PYTHON
