#!/usr/bin/env bash
# botocore 1.43.117: most of the time of parsing a listing of S3 is spent on the times of its objects.
#
# A listing has one ISO 8601 time per object, and a page a thousand of them. Listing a data set of a hundred thousand
# shards is a hundred pages, on every process that opens it.
#
# Expected: times cost little, compared with the XML itself. Actual: botocore's own parser of times takes more than half of the
# page; with datetime.fromisoformat, to the same values, the page takes about a quarter. Exits 0 while the behaviour is
# reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check botocore==1.43.117
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import time
from datetime import datetime
from statistics import median

import botocore.session
from botocore.parsers import ResponseParserFactory

KEYS = 1000
entries = "".join(
    f"<Contents><Key>shard-{n:06d}.tar</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
    f"<ETag>&quot;{n:032x}&quot;</ETag><Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
    for n in range(KEYS)
)
page = f'<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>{KEYS}</KeyCount>{entries}</ListBucketResult>'
session = botocore.session.get_session()
shape = session.get_service_model("s3").operation_model("ListObjectsV2").output_shape
response = {"body": page.encode(), "headers": {}, "status_code": 200}


def seconds(**options):
    """Processor seconds of parsing the page, and the first time in it."""
    factory = ResponseParserFactory()
    factory.set_parser_defaults(**options)
    parser = factory.create_parser("rest-xml")
    begun = time.process_time()
    found = parser.parse(response, shape)
    spent = time.process_time() - begun
    assert len(found["Contents"]) == KEYS
    return spent, found["Contents"][0]["LastModified"]


rounds = [(seconds(), seconds(timestamp_parser=datetime.fromisoformat)) for _ in range(7)]
(default, when), (iso, same) = rounds[0]
assert when == same, (when, same)
ratio = median(a[0] / b[0] for a, b in rounds)
slow, fast = (1e3 * median(each) for each in zip(*((a[0], b[0]) for a, b in rounds)))
print(f"a page of {KEYS} keys: {slow:.1f} ms, with datetime.fromisoformat {fast:.1f} ms; {ratio:.1f} times")
raise SystemExit(ratio < 2)
PYTHON
