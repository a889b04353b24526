"""What every tracker needs of a run folder: its recipe, a lock, how the run ended, and whether the folder is a copy."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from ...slurm.run_folder import no_run
from ..errors import AlreadyRunning, RunError
from ..io import read_json
from .metrics import read_events
from .renames import previews

log = logging.getLogger(__name__)
Otherwise = TypeVar("Otherwise", bound="str | None")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a run. Raises RunError if `folder` has none."""
    try:
        return yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(no_run(folder, "recipe.yaml")) from None


def lock(path: Path) -> Any:
    """A file that stays locked until it is closed or collected. Raises AlreadyRunning if another process holds it."""
    file = open(path, "wb")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AlreadyRunning(f"{path.parent} is being sent by another process: wait until that ends") from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked: %s", path, error)
    return file


def last_end(metrics: Path) -> dict[str, Any] | None:
    """The newest `end` event of a metrics file; None if the run was started again since, or never ended."""
    turns = [record for record in read_events(metrics) if record["event"] in ("start", "end")]
    return turns[-1] if turns and turns[-1]["event"] == "end" else None


def outcome_of(last: dict[str, Any] | None, otherwise: Otherwise) -> str | Otherwise:
    """The outcome of the `last_end` of a run, `otherwise` if there is none."""
    return last.get("outcome", "finished") if last else otherwise


class Preview(NamedTuple):
    """written: Unix time."""

    path: Path
    step: int
    written: float


def new_previews(folder: Path, sent: dict[str, tuple[int, int]]) -> list[Preview]:
    """The previews of a run by step, without those in `sent`, file name -> size and modification time, to which they
    are added."""
    found = []
    for path in sorted(previews(folder).glob("step-*.png")):
        status, step = path.stat(), path.stem.removeprefix("step-")
        mark = status.st_size, status.st_mtime_ns
        if step.isdecimal() and sent.get(path.name) != mark:
            sent[path.name] = mark
            found.append(Preview(path, int(step), status.st_mtime))
    return found


def is_copy(state: dict[str, Any], folder: Path, name: str) -> bool:
    """Whether `folder` is a copy of a run that still exists elsewhere, rather than moved. state: of the file `name` in
    it, with a `key` that is unique to the run and the `folder` that wrote it."""
    original = Path(state.get("folder", folder))
    try:
        if original.samefile(folder):
            return False
    except OSError:
        return False
    return (read_json(original / name) or {}).get("key") == state["key"]
