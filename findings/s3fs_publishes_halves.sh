#!/usr/bin/env bash
# s3fs 2026.9.0 publishes what has been written of an object when the block that writes it ends with an exception.
#
# On S3 an object exists only once it is complete: a multipart upload that is not completed leaves nothing to read. With
# `with filesystem.open(path, "wb") as file:` one would therefore expect that an error half-way leaves no object, which
# is the reason to prefer it to a file on disk. Closing the file completes the upload, and leaving the block closes it,
# whatever the cause: readers find a shard or a checkpoint cut short, with a valid ETag.
#
# Expected: no object, or the one from before. Actual: the half takes the place of the complete one.
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check s3fs==2026.9.0 'moto[server]==5.2.5'
cd "$folder"

AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_EC2_METADATA_DISABLED=true timeout 120 "$folder/venv/bin/python" - <<'PYTHON'
import logging

from moto.server import ThreadedMotoServer

import s3fs

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
filesystem = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
filesystem.mkdir("checkpoints")
part = bytes(5 * 2**20)
found = []
for parts, complete in ((1, part), (3, 3 * part)):
    path = f"checkpoints/{parts}.bin"
    filesystem.pipe(path, complete)
    try:
        with filesystem.open(path, "wb", block_size=len(part)) as file:
            for n in range(parts):
                if n == parts - 1:
                    file.write(part[: len(part) // 2])
                    raise RuntimeError("the source of the data fails")
                file.write(part)
    except RuntimeError as error:
        print(f"{path}: {error}")
    filesystem.invalidate_cache()
    size = filesystem.size(path)
    print(f"{path}: {size:,} of {len(complete):,} bytes")
    found.append(size / len(part))
server.stop()
raise SystemExit(found != [0.5, 2.5])
PYTHON
