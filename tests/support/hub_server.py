"""A model hub on loopback with the API that `huggingface_hub.snapshot_download` uses: revisions, file trees, files.

`writable` adds what `create_repo` and `upload_folder` use, with the LFS protocol for large files; the client's Xet
protocol, which it prefers, is not spoken. Both are served by `faulty_server`, so that they can have the same faults:
503, 429, a reset, a truncated body.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass
class Written:
    """What clients have sent to a hub."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """owner/name -> file -> bytes, of commits."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> bytes of large files."""
    private: dict[str, bool] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    """SHA-256 of each large file that was sent, in order."""


@contextlib.contextmanager
def writable(written: Written, forbidden: str | None = None) -> Iterator[tuple[str, Plan]]:
    """Serve a hub to which models can be sent; yields address and plan. forbidden: a model that may not be written."""

    def answer(handler: Any, sent: bytes, fault: str | None) -> tuple[int, dict[str, str], bytes]:
        path, kind = handler.path.partition("?")[0], {"Content-Type": "application/json"}
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name == forbidden:
                return 403, kind, b'{"error": "forbidden"}'
            code = 409 if name in written.models else 200
            if code == 200:
                written.models[name], written.private[name] = {}, asked.get("visibility") == "private"
            return code, kind, json.dumps({"url": f"http://{handler.headers['Host']}/{name}"}).encode()
        if path == "/api/validate-yaml":  # of the model card
            return 200, kind, b'{"errors": [], "warnings": []}'
        if path.endswith("/objects/batch"):
            objects = []
            for each in json.loads(sent)["objects"]:
                url = f"http://{handler.headers['Host']}/blob/{each['oid']}"
                upload = {} if each["oid"] in written.blobs else {"actions": {"upload": {"href": url}}}
                objects.append({**each, **upload})
            return 200, {"Content-Type": "application/vnd.git-lfs+json"}, json.dumps({"objects": objects}).encode()
        if path.startswith("/blob/"):
            digest = path.removeprefix("/blob/")
            assert hashlib.sha256(sent).hexdigest() == digest
            written.blobs[digest] = sent
            written.puts.append(digest)
            return 200, {}, b""
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/\w+", path)) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        name, verb = found.groups()
        if verb == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(sent)["files"]
            ]
            return 200, kind, json.dumps({"files": files}).encode()
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                written.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                written.models[name][value["path"]] = written.blobs[value["oid"]]
        url = f"http://{handler.headers['Host']}/{name}/commit/{COMMIT}"
        return 200, kind, json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode()

    with serving(answer) as (address, plan):
        yield address, plan
