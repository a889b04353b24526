"""Where a model's folder is: built in, local, or downloaded from the hub once and then cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...data.retry import described, failure, is_transient, retrying
from ...data.transience import causes, status
from ...recipes import FOLDER as RECIPES
from ..errors import RunError


def locate(
    path: str, revision: str | None = None, setting: str = "backbone.path", weights: str = "*.safetensors"
) -> Path:
    """The folder of a model: `builtin:NAME`, a local folder, or a hub id (downloaded once, then cached).

    setting: the config key, for errors. weights: glob of the weight files to download with configs and tokenizers.
    """
    if path.startswith("builtin:"):
        folder = RECIPES / "foundations" / path.removeprefix("builtin:")
        if not folder.is_dir():
            known = ", ".join(f"builtin:{p.name}" for p in sorted((RECIPES / "foundations").iterdir()))
            raise RunError(f"{setting}={path}: no such built-in model; there is {known}")
        return folder
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_file():
        raise RunError(f"{setting}={path}: is a file; give its folder, {Path(path).parent}")
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise RunError(f"{setting}={path}: no such folder, and not a hub id (owner/name)")
    key = (path, revision, weights)
    if key not in _snapshots:
        _snapshots[key] = _download(*key, f"{setting}={path}")
    return _snapshots[key]


_snapshots: dict[tuple[str, str | None, str], Path] = {}
"""Snapshots requested by this process: each is requested once."""
_cache_only = False


@contextmanager
def from_cache() -> Iterator[None]:
    """Read hub models from the local cache only, filled by another process of this machine."""
    global _cache_only
    before, _cache_only = _cache_only, True
    try:
        yield
    finally:
        _cache_only = before


def commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub model's `revision` in the local cache, or `revision` if it is not cached; None for a folder
    or a built-in model, which have none."""
    if path.startswith("builtin:") or Path(path).is_dir():
        return None
    try:
        return Path(_snapshot(path, revision=revision, local_files_only=True)).name
    except (OSError, ValueError):  # not cached
        return revision


def _download(path: str, revision: str | None, weights: str, where: str) -> Path:
    patterns = [weights, "*.json", "*.txt", "*.jinja", "*.model"]
    key = f"{where.partition('=')[0].removesuffix('.path')}.revision"
    hints = {"unset": f"{key}={revision} does not exist there; set {key}=null", "else": "give a local folder instead"}
    return fetch(path, revision, where, hints, allow_patterns=patterns, local_files_only=_cache_only)


def fetch(path: str, revision: str | None, where: str, hints: dict[str, str], **options: Any) -> Path:
    """The folder of a hub model, which is downloaded as by `snapshot_download`; transient errors are retried.

    where: names the model in errors, such as `backbone.path=owner/name`. hints: `unset`, for a revision that does not
    exist, and `else`, for other errors.
    """
    try:
        return Path(retrying(lambda: _snapshot(path, revision=revision, **options), where))
    except Exception as error:  # the hub client raises many types; all mean that the model is unavailable
        if is_transient(error):
            raise failure(where, error) from error
        kinds = {cls.__name__ for link in causes(error) for cls in type(link).__mro__}
        if revision is not None and "RevisionNotFoundError" in kinds:
            raise RunError(f"{where}: {hints['unset']}, or to a commit of this model") from error
        if "GatedRepoError" in kinds or {status(link) for link in causes(error)} & {401, 403}:
            raise RunError(
                f"{where}: may not be read, or does not exist ({described(error)}); check the name, accept its licence"
                " on the hub, and set HF_TOKEN"
            ) from error
        raise RunError(f"{where}: cannot be downloaded ({described(error)}); {hints['else']}") from error


def _snapshot(path: str, **options: Any) -> str:
    """huggingface_hub's `snapshot_download`, with truncated responses raised as ConnectionError.

    Without a Content-Length the client raises a JSONDecodeError, or an OSError without errno that only its text
    distinguishes from a full disk.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would log each of its own retries; `retrying` logs the first of ours
    try:
        return snapshot_download(path, **options)
    except json.JSONDecodeError as error:
        raise ConnectionError(f"an answer ended early or is not the hub's ({error})") from error
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise ConnectionError("a file ended early") from error


def architecture(path: str, revision: str | None = None, setting: str = "backbone.path") -> Path:
    """The folder of a model's configs, for counting only: published models need no download."""
    known = RECIPES / "architectures" / path
    return known if not Path(path).exists() and known.is_dir() else locate(path, revision, setting, "*.json")
