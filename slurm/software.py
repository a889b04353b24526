"""Fingerprint of the installed software, which must be equal on all ranks of a run."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PACKAGES = ("kernels", "data", "recipes", "slurm", "trainer")


@functools.cache
def all_versions() -> dict[str, str]:
    """Versions of Python and of every installed distribution, by name."""
    # `name` and `version` of a distribution each parse its whole metadata file.
    described = [each.metadata for each in metadata.distributions()]
    found = {each["Name"]: each["Version"] for each in described if each["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


@functools.cache
def source_digest() -> str:
    """Digest of this package's source files, which also works without version control."""
    root = Path(__file__).parents[1]
    return digest(file.read_text(encoding="utf-8") for name in PACKAGES for file in sorted((root / name).rglob("*.py")))


def fingerprint() -> str:
    """One hash of the versions and of this package's source."""
    return digest([*map("==".join, all_versions().items()), source_digest()])


def digest(parts: Iterable[str]) -> str:
    """SHA-256 of `parts`, its first twelve hex digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()[:12]
