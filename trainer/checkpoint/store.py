"""Checkpoint store of a run: crash-safe writes, verification before use, pruning."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.atomic import sync
from ..distributed.gather import Gather, single_process
from ..errors import RunError
from .layout import rank_file
from .manifest import Manifest, read_manifest
from .verification import HEADER, file_problem

if TYPE_CHECKING:  # they import torch, without which checkpoints can be listed and verified
    from .reader import CheckpointReader
    from .shard import Payload, Shard

log = logging.getLogger(__name__)


READERS = 4
"""Files that a process verifies at once: hashing releases Python's lock, and storage serves several requests."""


class StorageError(RunError):
    """Storage failed during a save. Retryable."""


class Store:
    """Checkpoints in `folder` (`RUN/checkpoints`), one folder per step: `step-00000200/`.

    Opening a store changes nothing. Folders that start with a dot are saves and removals in progress, or leftovers of
    a killed process.
    """

    def __init__(self, folder: str | Path):
        self.root = Path(folder)
        self._sound: set[int] = set()  # steps that this process wrote, or verified in full

    def folder(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, existing or not."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first, not verified."""
        if not self.root.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def require(self, step: int) -> int:
        """`step`; RunError if it has no folder."""
        if step not in (steps := self.steps()):
            there = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none"
            raise RunError(f"{self.root}: no checkpoint of step {step}; {there}")
        return step

    def save(self, step: int, content: Payload, gather: Gather = single_process) -> int:
        """Write the checkpoint of `step`; collective over all ranks. Returns its size in bytes.

        An existing checkpoint of that step is kept if it verifies (returns 0), else replaced. If a rank fails, raises
        the same RunError on all ranks (StorageError if storage is the cause) and removes the partial save.
        """
        rank = content.rank
        present = agreed(lambda: self._prepare(step) if rank == 0 else None, "prepare", rank, gather)[0]
        if present and not self._problems(step, rank, content.ranks, gather):
            return 0
        return self._collect(step, content.write, rank, gather)

    def assemble(self, step: int, write: Callable[[Path], Shard], rank: int, gather: Gather) -> int:
        """Like `save`, with files written by `write(folder)` on every rank."""
        agreed(lambda: self._prepare(step) if rank == 0 else None, "prepare", rank, gather)
        return self._collect(step, write, rank, gather)

    def _collect(self, step: int, write: Callable[[Path], Shard], rank: int, gather: Gather) -> int:
        partial = self.root / f".{self.folder(step).name}.partial"
        try:
            parts = agreed(lambda: write(partial), "write", rank, gather)
            files = {name: entry for part in parts for name, entry in part.files.items()}

            def commit() -> None:
                metadata = next(part.metadata for part in parts if part.metadata)
                self._commit(partial, Manifest(step=step, time=time.time(), files=files, **metadata._asdict()))

            agreed(lambda: commit() if rank == 0 else None, "commit", rank, gather)
        except RunError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._sound.add(step)
        return sum(entry.size for entry in files.values())

    def verify(
        self, step: int, share: tuple[int, int] = (0, 1), slots: Sequence[str] = (), but_tensors: bool = False
    ) -> list[str]:
        """Problems of the checkpoint of `step`, each naming a file; empty if it is valid.

        share: (rank, ranks), check only every `ranks`-th file, to divide the hashing over ranks. slots: read only the
        first of these that the checkpoint has, for callers that load no other. but_tensors: read only the headers of
        the ranks' files, for a caller that verifies the tensors while it loads them.
        """
        folder = self.folder(step)
        try:
            manifest = read_manifest(folder)
        except RunError as error:
            return [str(error)]
        problems = [f"{folder.name}/manifest.json: is of step {manifest.step}"] if manifest.step != step else []
        slot = next((slot for slot in slots if slot in manifest.slots), None)
        names = [HEADER] if but_tensors else [HEADER, slot] if slot else None
        files = sorted(manifest.files.items())[share[0] :: share[1]]
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(lambda each: file_problem(folder / each[0], each[1], content=True, names=names), files)
            problems += [
                f"{folder.name}/{name}: {problem}" for (name, _), problem in zip(files, found, strict=True) if problem
            ]
        if share[1] == 1 and names is None and not problems:
            self._sound.add(step)
        return problems

    def newest_verified(
        self,
        skip: Collection[int] = (),
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = single_process,
        slots: Sequence[str] = (),
        while_loaded: bool = False,
    ) -> CheckpointReader | None:
        """The newest valid checkpoint, except those in `skip`; None if there is none.

        Each refused one is logged with the file name. With `gather`, it is collective: the hashing is divided over the
        ranks, and all get the same result. slots: see `verify`. while_loaded: of a checkpoint saved by as many ranks,
        the tensors are not read yet; `CheckpointReader.load` verifies them, after which the caller may have to `refuse`
        the checkpoint.
        """
        from .reader import CheckpointReader

        steps = agreed(lambda: self.steps() if rank == 0 else None, "look for", rank, gather)[0]
        for step in reversed(steps):
            if step in skip:
                continue
            later = while_loaded and all(gather(self._has_slices_of(step, ranks)))
            problems = self._problems(step, rank, ranks, gather, slots, later)
            if not problems:
                return CheckpointReader(self.folder(step), own=rank if later else None)
            self.refuse(step, problems, rank)
        return None

    def refuse(self, step: int, problems: Sequence[str], rank: int) -> None:
        """Log on rank 0 why the checkpoint of `step` is not used."""
        if rank == 0:
            log.error("checkpoint of step %d refused: %s", step, "; ".join(problems))

    def prune(self, keep: int, spared: Collection[int] = ()) -> list[int]:
        """Remove all but the newest `keep` checkpoints and those of the steps `spared`, on rank 0 only; return the
        removed steps.

        If none of those kept is valid, the newest older valid one is kept too. A removal that fails is logged, not
        raised.
        """
        steps = self.steps()
        kept, old = steps[-keep:], [step for step in steps[:-keep] if step not in spared]
        if old and not any(self._is_sound(step) for step in reversed(kept)):
            sound = next((step for step in reversed(old) if self._is_sound(step)), None)
            old = [step for step in old if step != sound]
        removed = []
        for step in old:
            try:
                self._remove(step)
            except OSError as error:
                log.warning("checkpoint of step %d could not be removed: %s", step, error)
            else:
                removed.append(step)
        return removed

    def remove_after(self, step: int, rank: int = 0, gather: Gather = single_process) -> None:
        """Remove those later than `step`, newest first; collective. Raises RunError on all ranks if one remains."""

        def remove() -> None:
            for late in reversed([each for each in self.steps() if each > step]):
                self._remove(late)

        agreed(lambda: remove() if rank == 0 else None, "remove", rank, gather)

    def sweep(self) -> None:
        """Remove leftovers of killed saves and removals, on rank 0 of the run that owns the folder.

        Files that cannot be removed, for example because a reader on NFS holds them, are logged and left.
        """
        for path in self.root.glob(".step-*"):
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s could not be removed: %s", path, error)

    def _prepare(self, step: int) -> bool:
        self.root.mkdir(parents=True, exist_ok=True)
        self.sweep()
        return self.folder(step).is_dir()

    def _commit(self, partial: Path, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            problem = file_problem(partial / name, entry, content=False)
            if problem:
                raise RunError(f"{name} as rank 0 sees it: {problem}; is {self.root} on a disk that all nodes share?")
        manifest.write(partial)
        sync(partial)
        if self.folder(manifest.step).is_dir():  # one that did not verify
            self._remove(manifest.step)
        partial.rename(self.folder(manifest.step))
        sync(self.root)

    def _remove(self, step: int) -> None:
        # Renamed first, atomically: a half-removed folder is never mistaken for a checkpoint.
        aside = self.root / f".{self.folder(step).name}.removed"
        self.folder(step).rename(aside)
        self._sound.discard(step)
        sync(self.root)
        shutil.rmtree(aside)

    def _is_sound(self, step: int) -> bool:
        return step in self._sound or not self.verify(step)

    def _has_slices_of(self, step: int, ranks: int) -> bool:
        """Whether each of `ranks` ranks finds its slices in one file, with a hash of every slot."""
        try:
            manifest = read_manifest(self.folder(step))
        except RunError:
            return False
        files = [manifest.files.get(rank_file(rank)) for rank in range(manifest.ranks)]
        return manifest.ranks == ranks and all(
            entry is not None and entry.spans.keys() == {HEADER, *manifest.slots} for entry in files
        )

    def _problems(
        self,
        step: int,
        rank: int,
        ranks: int,
        gather: Gather,
        slots: Sequence[str] = (),
        but_tensors: bool = False,
    ) -> list[str]:
        shares = gather(self.verify(step, (rank, ranks), slots, but_tensors))
        return list(dict.fromkeys(problem for share in shares for problem in share))


def agreed(action: Callable[[], Any], verb: str, rank: int, gather: Gather) -> list[Any]:
    """Run `action` on every rank and return all results. An exception on any rank becomes the same RunError on all, or
    a StorageError if all failures are storage failures."""
    result = failure = cause = None
    try:
        result = action()
    except OSError as error:
        cause = error
        failure = RunError.from_storage_error(f"rank {rank} could not {verb} the checkpoint: {error.filename}", error)
    except Exception as error:  # any other failure must also reach the other ranks, which would wait for this one
        failure, cause = RunError(f"rank {rank} could not {verb} the checkpoint: {error}"), error
    outcomes = gather((result, failure, isinstance(cause, OSError)))
    failures = sorted((storage, rank) for rank, (_, failure, storage) in enumerate(outcomes) if failure)
    if failures:
        storage, first = failures[0]  # failures other than storage come first
        also = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raised = (StorageError if storage else RunError)(f"{outcomes[first][1]}{also}")
        raised.transient = outcomes[first][1].transient
        raise raised from cause
    return [result for result, *_ in outcomes]
