"""Exported folders on a model hub: sent and fetched by the hub's own client, and compared with their hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.retry import described, failure, is_transient, retrying
from ...data.transience import causes, status
from ..errors import RunError
from ..models.hub import fetch
from .model_card import CARD
from .sums import SUMS, verify_sums

_PROGRESS = Path(".cache") / "huggingface"
"""Where the client keeps what it needs to continue a transfer, in the folder itself."""


def push(folder: Path, name: str, private: bool = True) -> str:
    """Send the exported `folder` to the hub's model `name`, owner/name, as one commit; returns the commit's address.

    A new model is private unless stated otherwise; an existing one stays as it is. Files that arrived before an
    interruption are not sent again. RunError for a folder that is not an export or is damaged, and for what the hub
    refuses.
    """
    _require_name(name)
    if not (folder / CARD).is_file():
        raise RunError(f"{folder}: has no {CARD}; give a folder that `bifrost export` wrote")
    if (folder / SUMS).is_file():
        verify_sums(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it would log each of its own retries; `retrying` logs the first of ours
    api = HfApi()

    def send() -> str:
        api.create_repo(name, private=private, exist_ok=True)
        left_out = [f"{_PROGRESS.parent}/**"]
        message = f"Export of {folder.resolve().name}"
        sent = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=left_out)
        return str(sent.commit_url)

    try:
        return retrying(send, name)
    except Exception as error:  # the hub client raises many types
        raise _refusal(name, error) from error


def pull(name: str, out: Path, revision: str | None = None) -> Path:
    """Fetch the hub's model `name` into `out`, a new folder or one in which the same was interrupted, which continues;
    compare the files with their hashes. RunError for what the hub refuses, and for damaged files."""
    _require_name(name)
    if out.exists() and not (out / _PROGRESS).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}, choose a new folder")
    missing = f"has no revision {revision}; set --revision to main"
    fetch(name, revision, name, {"unset": missing, "else": "check its name"}, local_dir=out)
    if (out / SUMS).is_file():
        verify_sums(out)
    return out


def _require_name(name: str) -> None:
    if name.count("/") != 1 or not all(name.split("/")):
        raise RunError(f"{name}: not a hub id (owner/name)")


def _refusal(name: str, error: Exception) -> Any:
    if is_transient(error):
        return failure(name, error)
    if {status(link) for link in causes(error)} & {401, 403}:
        return RunError(
            f"{name}: may not be written ({described(error)}); set HF_TOKEN to a token that may write there"
        )
    return RunError(f"{name}: cannot be sent ({described(error)})")
