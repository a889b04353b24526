"""The manifest of a checkpoint. It is written last, so a folder without one is incomplete."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from ...data.retry import retrying
from ..errors import RunError
from .durable import HASHES, WHOLE, Entry, write_file

MANIFEST = "manifest.json"
FORMAT = 2
READABLE = (1, 2)
"""Formats that can be read. In format 1 every hash is a SHA-256, and files have one of the whole in addition."""


class Manifest(BaseModel):
    """Content of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = FORMAT
    step: int
    ranks: int
    """Ranks that wrote it, one file each."""
    time: float
    """Unix time of the save."""
    slots: list[str]
    """Kinds of state: `master` and `ema` of every parameter, and the optimizer's, such as `exp_avg`."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter by name."""
    files: dict[str, Entry]
    """Size and hashes of every other file in the folder."""

    @field_validator("files")
    @classmethod
    def _in_the_folder(cls, files: dict[str, Entry]) -> dict[str, Entry]:
        """Names are joined to folders for reading and writing: none may point outside of them."""
        for name in files:
            if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII) or name == MANIFEST:
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        return files

    @field_validator("files")
    @classmethod
    def _covered(cls, files: dict[str, Entry]) -> dict[str, Entry]:
        """No byte of a file is without a hash."""
        for name, entry in files.items():
            end = 0
            for span in entry.spans.values():
                if span.start != end or span.size < 0 or span.hash.partition(":")[0] not in HASHES:
                    raise ValueError(f"{name}: its spans do not follow each other, or have unknown hashes")
                end += span.size
            if not entry.spans or end != entry.size:
                raise ValueError(f"{name}: its spans do not cover it")
        return files

    def encode(self) -> bytes:
        """Readable JSON that ends with a hash of everything before it."""
        return _encoded(self.model_dump(mode="json"))

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder` and flush it. Raises OSError."""
        write_file(folder / MANIFEST, {WHOLE: [self.encode()]})


def _encoded(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`. Raises RunError, naming the file, if it is missing or damaged."""
    path = folder / MANIFEST
    where = f"{folder.name}/{MANIFEST}"
    try:
        raw = retrying(path.read_bytes, path)
    except OSError as error:
        raise RunError(f"{where}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}") from error
    try:
        body = json.loads(raw)
        body.pop("sha256")
        later = body["format"] not in READABLE
        manifest = None if later else Manifest.model_validate(_of_format_1(body) if body["format"] == 1 else body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{where}: damaged, it is not a manifest") from error
    if manifest is None:
        readable = " and ".join(map(str, READABLE))
        raise RunError(f"{where}: format {body['format']}, this version reads formats {readable}")
    if _encoded(body) != raw:  # the hash is part of the encoding
        raise RunError(f"{where}: damaged, its content does not match its own sha256")
    return manifest


def _of_format_1(body: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest of format 1 in today's form."""
    files = {}
    for name, entry in body["files"].items():
        spans = entry.get("spans") or {WHOLE: {"start": 0, **entry}}
        files[name] = {
            "size": entry["size"],
            "spans": {
                span: {"start": about["start"], "size": about["size"], "hash": f"sha256:{about['sha256']}"}
                for span, about in spans.items()
            },
        }
    return {**body, "format": FORMAT, "files": files}
