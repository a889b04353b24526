"""A model hub on loopback with the API that `huggingface_hub.snapshot_download` uses: revisions, file trees, files.

It is served by `faulty_server`, so that it can have the same faults: 503, 429, a reset, a truncated body.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from faulty_server import Plan, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of every model's `main`."""


@contextlib.contextmanager
def hub(models: Mapping[str, Mapping[str, bytes]], gated: str | None = None) -> Iterator[tuple[str, Plan]]:
    """Serve a hub of models, `owner/name` -> file -> bytes, each with the one commit COMMIT; yields address and plan.

    gated: a model whose licence has not been accepted.
    """

    def answer(handler: Any, sent: bytes, fault: str | None) -> tuple[int, dict[str, str], bytes]:
        path = handler.path.partition("?")[0]
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)", path) or re.fullmatch(
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path
        )
        if found is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        model, revision, *file = found.groups()
        if model not in models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if model == gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = models[model]
        if not file:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            about = {"id": model, "sha": COMMIT, "siblings": [], "tags": []}
            body = json.dumps(tree if "/tree/" in path else about).encode()
            return 200, {"Content-Type": "application/json"}, body
        if file[0] not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        data = files[file[0]]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if handler.command == "HEAD":
            return 200, {**headers, "Content-Length": str(len(data))}, b""
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked is None:
            return 200, headers, data
        first = int(asked.group(1))
        return 206, {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}, data[first:]

    with serving(answer) as (address, plan):
        yield address, plan
