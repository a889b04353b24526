"""Copies of a run's checkpoints at another address: an object store, or any storage that fsspec can write.

At ADDRESS/RUN there is a folder per copied checkpoint, as in the run's own `checkpoints/`, the files with which the run
continues elsewhere, and `copies.json`, which is written last and names the complete copies.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem

from ...data.errors import DataLost, DataMissing
from ...data.retry import call
from ...data.upload import sender
from ...slurm.io import read_json, write_json
from ..errors import RunError
from .durable import sha256
from .manifest import MANIFEST, read_manifest
from .store import Store
from .verification import file_problem

T = TypeVar("T")

COPIES = "copies.json"
RUN_FILES = ("recipe.yaml", "mixture.json", "metrics.jsonl", "environment.json")
"""Files of the run folder that are copied with a checkpoint, if there are any: recipe and data for `bifrost train` and
`bifrost replay`, metrics for everybody."""


@dataclass
class Copied:
    manifest: str
    """SHA-256 of the checkpoint's manifest, which identifies its content."""
    size: int
    """Bytes of its files."""


@dataclass
class Record:
    """Content of `copies.json`."""

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identifies the run: its folder has the same."""
    steps: dict[str, Copied] = field(default_factory=dict)
    """The complete copies by step."""
    begun: tuple[str, str] | None = None
    """Step of a copy that is not complete, and the hash of its manifest; its files may be continued."""


class Copies:
    """The copies of the run in folder `run`, at `address`.

    keep: newest copies that are never removed; older ones are, once the run has no such checkpoint either. Failures of
    the storage are DataErrors, as for the reading of data.
    """

    def __init__(self, run: Path, address: str, keep: int = 1, name: str | None = None) -> None:
        """name: of the run there, if the folder has another one."""
        self.run, self.keep = run.resolve(), keep
        self.place = f"{address.rstrip('/')}/{name or self.run.name}"
        self.store = Store(self.run / "checkpoints")
        self.fs, self.path = sender(self.place)

    def claim(self) -> None:
        """Make the address this run's. RunError if there are copies of another run; DataError if it cannot be
        written."""
        found, known = self._found(), read_json(self.run / COPIES)
        if found is not None and found.steps and (known is None or known.get("run") != found.run):
            last = max(map(int, found.steps))
            raise RunError(
                f"checkpoint.upload: {self.place} has checkpoints of another run, the last one of step {last}:"
                f" `bifrost checkpoint download {self.place} {self.run}` continues that one; or take another name or"
                " address"
            )
        if found is None:
            self._write(self._new_record())

    def there(self) -> dict[int, str]:
        """Step of each of the run's checkpoints, oldest first, and the hash of its manifest."""
        found = {}
        for step in self.store.steps():
            with suppress(FileNotFoundError):  # pruned meanwhile
                found[step] = sha256(self.store.folder(step) / MANIFEST)
        return found

    def missing(self, there: Mapping[int, str]) -> list[int]:
        """Those of the run's checkpoints `there` that have no copy, oldest first."""
        found = self._found()
        known = {int(step): each.manifest for step, each in found.steps.items()} if found else {}
        return [step for step, digest in there.items() if known.get(step) != digest]

    def copy(self, step: int, folder: Path, sent: Callable[[int], None] = lambda count: None) -> int:
        """Copy the checkpoint of `step`, whose files are in `folder`; returns the bytes sent.

        Files that an interrupted copy of the same checkpoint has completed are not sent again. sent: called with the
        bytes of each further file. RunError, and no copy, if a file does not have the hash in the manifest.
        """
        record, manifest, digest = self._found() or self._new_record(), read_manifest(folder), sha256(folder / MANIFEST)
        target = self._target(step)
        if record.begun != (str(step), digest):
            abandoned = {str(step), *([record.begun[0]] if record.begun else [])} - (record.steps.keys() - {str(step)})
            record.steps.pop(str(step), None)
            record.begun = str(step), digest
            self._write(record)  # first: what is removed now is no longer named as complete
            for each in abandoned:
                self._remove(self._target(int(each)))
        total = 0
        for name, entry in sorted(manifest.files.items()):
            if self._size(f"{target}/{name}") != entry.size:
                if problem := file_problem(folder / name, entry, content=True):
                    raise RunError(f"{folder.name}/{name}: {problem}; the checkpoint of step {step} is not copied")
                self._put(folder / name, f"{target}/{name}", entry.size)
                total += entry.size
            sent(entry.size)
        self._put(folder / MANIFEST, f"{target}/{MANIFEST}", None)
        for name in RUN_FILES:
            if (self.run / name).exists():
                self._put(self.run / name, f"{self.path}/{name}", None)
        record.steps[str(step)] = Copied(digest, sum(entry.size for entry in manifest.files.values()))
        record.begun = None
        self._write(record)
        self._prune(record)
        return total

    def steps(self) -> dict[int, int]:
        """Step and bytes of the complete copies, oldest step first. RunError if there is none."""
        found = self._found()
        if found is None or not found.steps:
            raise RunError(
                f"{self.place}: has no complete checkpoint; name ADDRESS/RUN, as `checkpoint.upload` made it"
            )
        return {step: found.steps[str(step)].size for step in sorted(map(int, found.steps))}

    def fetch(self, step: int, received: Callable[[int], None] = lambda count: None) -> None:
        """Write the copy of `step` into the run folder, and what else the folder lacks. RunError, and no checkpoint, if
        a file does not have the hash in its manifest.

        Files of an interrupted call are not read again. received: called with the bytes of each further file.
        """
        found, known = self._found(), read_json(self.run / COPIES)
        if found is None or str(step) not in found.steps:
            raise RunError(f"{self.place}: has no complete checkpoint of step {step}")
        if self.store.steps() and (known is None or known.get("run") != found.run):
            raise RunError(f"{self.run}: has checkpoints of another run; name another folder")
        folder = self.store.folder(step)
        if folder.exists():
            raise RunError(f"{folder}: exists; remove it, or name another run folder")
        partial = self.run / "copies" / folder.name
        partial.mkdir(parents=True, exist_ok=True)
        source = self._target(step)
        self._get(f"{source}/{MANIFEST}", partial / MANIFEST)
        for name, entry in sorted(read_manifest(partial).files.items()):
            if file_problem(partial / name, entry, content=True):
                self._get(f"{source}/{name}", partial / name)
                if problem := file_problem(partial / name, entry, content=True):
                    (partial / name).unlink(missing_ok=True)
                    raise RunError(f"{self.place}/checkpoints/{folder.name}/{name}: {problem}")
            received(entry.size)
        for name in RUN_FILES:
            if not (self.run / name).exists():
                with suppress(DataMissing):
                    self._get(f"{self.path}/{name}", self.run / name)
        self.store.root.mkdir(exist_ok=True)
        write_json(self.run / COPIES, asdict(found))
        partial.rename(folder)
        with suppress(OSError):
            partial.parent.rmdir()

    def _target(self, step: int) -> str:
        return f"{self.path}/checkpoints/{self.store.folder(step).name}"

    def _new_record(self) -> Record:
        known = read_json(self.run / COPIES)
        return Record(**({"run": known["run"]} if known else {}))

    def _found(self) -> Record | None:
        def read() -> bytes | None:
            with suppress(FileNotFoundError):
                return self.fs.cat_file(f"{self.path}/{COPIES}")
            return None

        content = self._call(read, f"{self.path}/{COPIES}")
        if content is None:
            return None
        try:
            stored: dict[str, Any] = json.loads(content)
            steps, begun = {step: Copied(**each) for step, each in stored["steps"].items()}, stored["begun"]
            return Record(stored["run"], steps, None if begun is None else (begun[0], begun[1]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{self.place}/{COPIES}: damaged; remove it to copy all checkpoints again") from error

    def _write(self, record: Record) -> None:
        write_json(self.run / COPIES, asdict(record))
        content = json.dumps(asdict(record), indent=1).encode()

        def write() -> None:
            self._make_folder(self.path)
            self.fs.pipe_file(f"{self.path}/{COPIES}", content)

        self._call(write, f"{self.path}/{COPIES}")

    def _prune(self, record: Record) -> None:
        """Remove old copies, and those of steps that the run has given up by a rollback."""
        here = set(self.store.steps())
        old = sorted(map(int, record.steps))[: -self.keep]
        for step in list(record.steps):
            if int(step) not in here and (int(step) in old or int(step) > max(here, default=int(step))):
                del record.steps[step]
                self._write(record)
                self._remove(self._target(int(step)))

    def _size(self, path: str) -> int | None:
        def size() -> int | None:
            with suppress(FileNotFoundError):
                return self.fs.info(path)["size"]
            return None

        return self._call(size, path)

    def _put(self, file: Path, path: str, size: int | None) -> None:
        def put() -> None:
            self._make_folder(path.rpartition("/")[0])
            self.fs.put_file(str(file), path)

        self._call(put, path)
        if size is not None and (there := self._size(path)) != size:
            raise DataLost(f"{path}: has {there} bytes after {size} were sent; check the storage")

    def _make_folder(self, path: str) -> None:
        if not isinstance(self.fs, AsyncFileSystem):  # object stores have none; s3fs would create the bucket
            self.fs.makedirs(path, exist_ok=True)

    def _get(self, path: str, file: Path) -> None:
        self._call(lambda: self.fs.get_file(path, str(file)), path)

    def _remove(self, path: str) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

        self._call(remove, path)

    def _call(self, action: Callable[[], T], path: str) -> T:
        return call(action, self.fs.unstrip_protocol(path))
