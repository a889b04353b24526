"""Node-local shards of a save: on local disks before shared storage has them all, and recovered after a crash.

Every rank writes its shard, a folder with its files and their manifest, into `DIR/RUN-ID/`, where ID identifies the run
folder. Local shards are removed once the shared store has the checkpoint; those found at startup were left by a crash
or a storage failure.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ...data.atomic import sync, write_atomic
from ..distributed.process_group import Gather
from ..errors import RunError
from .durable import Span, read_blocks, write_file
from .manifest import Manifest, read_manifest
from .shard import Payload, Shard, ShardMetadata
from .store import StorageError, Store, agreed

log = logging.getLogger(__name__)

ID = "local-id"
_NAME = re.compile(r"step-(\d{8,})\.([0-9a-f]+)-[0-9a-f]+\.rank-(\d{5,})-of-(\d{5,})")


class LocalParts:
    """Shards on this rank's node; all ranks create it together, which reads or creates the run's id."""

    def __init__(self, folder: str | Path, store: Store, name: str, rank: int, gather: Gather) -> None:
        self.rank = rank
        run_id = agreed(lambda: _run_id(store) if rank == 0 else None, "prepare", rank, gather)[0]
        self.root = Path(folder) / f"{name}-{run_id}"

    def save(self, step: int, content: Payload, gather: Gather) -> bool:
        """Write this rank's shard; return whether all ranks succeeded, else none is kept. Older ones are removed."""
        # Shards of different saves never mix, even of the same step: rank 0 names the save.
        attempt = gather(f"{int(time.time()):x}-{uuid.uuid4().hex[:8]}")[0]
        name = f"step-{step:08d}.{attempt}.rank-{content.rank:05d}-of-{content.ranks:05d}"
        failure = None
        try:
            self._write(name, step, content)
        except OSError as error:
            failure = f"rank {self.rank}: {error.filename}: {error.strerror}"
        except Exception as error:  # the other ranks wait for this one; the save to the shared store raises it
            failure = f"rank {self.rank}: {error}"
        failures = [text for text in gather(failure) if text]
        self._remove(keep=name if not failures else None, among=name if failures else None)
        if failures:
            log.warning("no local copy of step %d, it goes to shared storage only: %s", step, failures[0])
        return not failures

    def clear(self) -> None:
        """Remove this rank's shards once the shared store has the checkpoint."""
        self._remove()

    def recover(self, store: Store, gather: Gather) -> int | None:
        """Copy the newest complete set of shards, if newer than the store's newest checkpoint, into `store`.

        Call it on every rank, on any number of nodes; a set is complete if each shard is on one of them. Returns its
        step, and removes the local shards. Raises StorageError, and removes nothing, if shared storage fails.
        """
        held = gather([path.name for path in self.root.glob("step-*")] if self.root.is_dir() else [])
        step, since = gather(_newest(store))[0]
        recovered = None
        for (found, made, _), parts in sorted(_sets(held).items(), reverse=True):
            if found <= step or made < int(since):
                continue
            ranks = int(next(iter(parts.values()))[0].rpartition("-")[2])
            if len(parts) < ranks:
                if self.rank == 0:
                    log.warning("the nodes hold %d of the %d local parts of step %d: skipped", len(parts), ranks, found)
                continue
            mine = [name for part, (name, seen_by) in parts.items() if seen_by[part % len(seen_by)] == self.rank]
            try:
                store.assemble(found, lambda partial, mine=mine: self._copy(mine, partial), self.rank, gather)
            except StorageError:
                raise
            except RunError as error:
                if self.rank == 0:
                    log.error("the local parts of step %d are not used: %s", found, error)
                continue
            if self.rank == 0:
                log.warning("checkpoint of step %d recovered from the nodes' local disks", found)
            recovered = found
            break
        gather(None)  # no rank may remove files that another still reads
        shutil.rmtree(self.root, ignore_errors=True)
        return recovered

    def _write(self, name: str, step: int, content: Payload) -> None:
        partial = self.root / f".{name}"
        partial.mkdir(parents=True, exist_ok=True)
        files = content.write(partial).files
        metadata = content.metadata()
        Manifest(step=step, time=time.time(), files=files, **metadata._asdict()).write(partial)
        sync(partial)
        partial.rename(self.root / name)
        sync(self.root)

    def _copy(self, names: list[str], partial: Path) -> Shard:
        files, metadata = {}, None
        for name in names:
            manifest = read_manifest(self.root / name)
            partial.mkdir(exist_ok=True)
            for file, entry in manifest.files.items():
                content = {span: _blocks(self.root / name / file, where) for span, where in entry.spans.items()}
                if write_file(partial / file, content, entry.algorithm) != entry:
                    raise RunError(f"{name}/{file}: damaged, its content does not match its manifest")
                files[file] = entry
            metadata = ShardMetadata(manifest.ranks, manifest.slots, manifest.shapes)
        return Shard(files, metadata)

    def _remove(self, keep: str | None = None, among: str | None = None) -> None:
        suffix = f".rank-{self.rank:05d}-of-"
        for path in self.root.glob(f"*{suffix}*"):
            if path.name != keep and (among is None or path.name.lstrip(".") == among):
                shutil.rmtree(path, ignore_errors=True)


def _run_id(store: Store) -> str:
    """Id of this run folder: moves with the folder, so that its local shards stay attributed to it."""
    path = store.root / ID
    if not path.exists():
        store.root.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid.uuid4().hex[:12].encode())
    found = path.read_text(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{12}", found):  # it becomes part of a folder name that is removed in the end
        raise RunError(f"{path}: not the id of a run's local parts; delete the file, and the parts with it")
    return found


def _newest(store: Store) -> tuple[int, float]:
    """(step, time) of the newest checkpoint in the store."""
    for step in reversed(store.steps()):
        try:
            return step, read_manifest(store.folder(step)).time
        except RunError:
            continue
    return -1, 0.0


def _sets(held: list[list[str]]) -> dict[tuple[int, int, str], dict[int, tuple[str, list[int]]]]:
    """(step, time, save) -> part -> its folder's name and the ranks that see it."""
    sets: dict[tuple[int, int, str], dict[int, tuple[str, list[int]]]] = {}
    for rank, names in enumerate(held):
        for name in names:
            match = _NAME.fullmatch(name)
            if match:
                parts = sets.setdefault((int(match[1]), int(match[2], 16), name.partition(".rank")[0]), {})
                parts.setdefault(int(match[3]), (name, []))[1].append(rank)
    return sets


def _blocks(path: Path, span: Span) -> Iterator[memoryview]:
    try:
        yield from read_blocks(path, span.start, span.size)
    except OSError as error:  # not the shared storage's
        raise RunError(f"{path.parent.name}/{path.name}: unreadable, {error.strerror}") from error
