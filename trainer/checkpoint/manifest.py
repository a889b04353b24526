"""The manifest of a checkpoint. It is written last, so a folder without one is incomplete."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ...data.retry import retrying
from ..errors import RunError
from .durable import Entry, write_file

MANIFEST = "manifest.json"
FORMAT = 1


class Manifest(BaseModel):
    """Content of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    step: int
    ranks: int
    """Ranks that wrote it, one file each."""
    time: float
    """Unix time of the save."""
    slots: list[str]
    """Kinds of state stored for each parameter, such as `master` and `exp_avg`."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter by name."""
    files: dict[str, Entry]
    """Size and hash of every other file in the folder."""

    @field_validator("files")
    @classmethod
    def _in_the_folder(cls, files: dict[str, Entry]) -> dict[str, Entry]:
        """Names are joined to folders for reading and writing: none may point outside of them."""
        for name in files:
            if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII) or name == MANIFEST:
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        return files

    def encode(self) -> bytes:
        """Readable JSON that ends with a hash of everything before it."""
        body = self.model_dump(mode="json", exclude_none=True)  # same as manifests of versions without spans
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return (json.dumps({**body, "sha256": digest}, indent=1) + "\n").encode()

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder` and flush it. Raises OSError."""
        write_file(folder / MANIFEST, [self.encode()])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`. Raises RunError, naming the file, if it is missing or damaged."""
    path = folder / MANIFEST
    where = f"{folder.name}/{MANIFEST}"
    try:
        raw = retrying(path.read_bytes, path)
    except OSError as error:
        raise RunError(f"{where}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}") from error
    try:
        content = json.loads(raw)
        content.pop("sha256")
        if content["format"] != FORMAT:
            raise RunError(f"{where}: format {content['format']}, this version reads format {FORMAT}")
        manifest = Manifest.model_validate(content)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{where}: damaged, it is not a manifest") from error
    if manifest.encode() != raw:  # the hash is part of the encoding
        raise RunError(f"{where}: damaged, its content does not match its own sha256")
    return manifest
