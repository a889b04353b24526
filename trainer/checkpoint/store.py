"""The checkpoints of a run: written so that a kill at any moment leaves a whole one, verified before they are used."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..distributed.process_group import Gather, alone
from ..errors import RunError
from .durable import sync_folder
from .manifest import Manifest, read_manifest
from .reader import CheckpointReader
from .shard import Content, Part, file_problem
from .staging import Slots

log = logging.getLogger(__name__)


class StorageError(RunError):
    """The disk did not take a save; another try may succeed."""


class Store:
    """Checkpoints in `folder` (`RUN/checkpoints`), one folder a step: `step-00000200/`.

    Opening a store touches nothing. Folders whose name starts with a dot are saves and removals under way, or what a
    killed process left of them.
    """

    def __init__(self, folder: str | Path):
        self.root = Path(folder)
        self._sound: set[int] = set()  # steps that this process wrote, or verified in full

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` lies or would lie."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first; whether each can be used is for `verify` to say."""
        if not self.root.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self,
        step: int,
        rank: int,
        ranks: int,
        slots: Slots,
        shapes: Mapping[str, tuple[int, ...]],
        state: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        gather: Gather = alone,
    ) -> int:
        """`save_content` of what these make up, see `Content`."""
        return self.save_content(step, Content(rank, ranks, slots, shapes, state, buffers), gather)

    def save_content(self, step: int, content: Content, gather: Gather = alone) -> int:
        """Write the checkpoint of `step`; every rank calls it and all leave together. Returns its bytes.

        A checkpoint of that step that verifies is kept as it is, 0 bytes; one that does not is replaced.
        Raises the same RunError on all ranks when one of them could not write, a StorageError when the cause is the
        disk's; nothing of the save stays.
        """
        rank = content.rank
        present = agreed(lambda: self._prepare(step) if rank == 0 else None, "prepare", rank, gather)[0]
        if present and not self._problems(step, rank, content.ranks, gather):
            return 0
        return self._collect(step, content.write, rank, gather)

    def assemble(self, step: int, write: Callable[[Path], Part], rank: int, gather: Gather) -> int:
        """Like `save`, of files that `write(folder)` puts there: the parts of all ranks make up the checkpoint."""
        agreed(lambda: self._prepare(step) if rank == 0 else None, "prepare", rank, gather)
        return self._collect(step, write, rank, gather)

    def _collect(self, step: int, write: Callable[[Path], Part], rank: int, gather: Gather) -> int:
        partial = self.root / f".{self.folder(step).name}.partial"
        try:
            parts = agreed(lambda: write(partial), "write", rank, gather)
            files = {name: entry for part in parts for name, entry in part.files.items()}

            def commit() -> None:
                about = next(part.about for part in parts if part.about)
                self._commit(partial, Manifest(step=step, time=time.time(), files=files, **about._asdict()))

            agreed(lambda: commit() if rank == 0 else None, "commit", rank, gather)
        except RunError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self._sound.add(step)
        return sum(entry.size for entry in files.values())

    def verify(self, step: int, share: tuple[int, int] = (0, 1), slots: Sequence[str] = ()) -> list[str]:
        """What is wrong with the checkpoint of `step`, each naming a file; empty when it is whole.

        `share` (rank, ranks) checks every `ranks`-th file only, so that ranks divide the hashing among them. slots:
        only the first of these that the checkpoint holds is read, for those who load no other.
        """
        folder = self.folder(step)
        try:
            manifest = read_manifest(folder)
        except RunError as error:
            return [str(error)]
        problems = [f"{folder.name}/manifest.json: is of step {manifest.step}"] if manifest.step != step else []
        slot = next((slot for slot in slots if slot in manifest.slots), None)
        for name, entry in sorted(manifest.files.items())[share[0] :: share[1]]:
            problem = file_problem(folder / name, entry, content=True, slot=slot)
            if problem:
                problems.append(f"{folder.name}/{name}: {problem}")
        if share[1] == 1 and slot is None and not problems:
            self._sound.add(step)
        return problems

    def newest_verified(
        self,
        skip: Collection[int] = (),
        rank: int = 0,
        ranks: int = 1,
        gather: Gather = alone,
        slots: Sequence[str] = (),
    ) -> CheckpointReader | None:
        """The newest checkpoint that is whole, `skip` left out; None when there is none.

        Each refused one is logged with the file's name. With `gather` every rank calls it, the hashing is divided
        among them, and all get the same one. slots: see `verify`.
        """
        steps = agreed(lambda: self.steps() if rank == 0 else None, "look for", rank, gather)[0]
        for step in reversed(steps):
            if step in skip:
                continue
            problems = self._problems(step, rank, ranks, gather, slots)
            if not problems:
                return CheckpointReader(self.folder(step))
            if rank == 0:
                log.error("checkpoint of step %d refused: %s", step, "; ".join(problems))
        return None

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` checkpoints, for rank 0 alone; returns the removed steps.

        While none of those kept is whole, the newest older one that is whole stays too. A removal that fails is
        logged, not raised.
        """
        steps = self.steps()
        kept, old = steps[-keep:], steps[:-keep]
        if old and not any(self._is_sound(step) for step in reversed(kept)):
            spared = next((step for step in reversed(old) if self._is_sound(step)), None)
            old = [step for step in old if step != spared]
        removed = []
        for step in old:
            try:
                self._remove(step)
            except OSError as error:
                log.warning("checkpoint of step %d could not be removed: %s", step, error)
            else:
                removed.append(step)
        return removed

    def remove_after(self, step: int, rank: int = 0, gather: Gather = alone) -> None:
        """Remove those later than `step`, newest first; every rank calls it. RunError on all when one stays."""

        def remove() -> None:
            for late in reversed([each for each in self.steps() if each > step]):
                self._remove(late)

        agreed(lambda: remove() if rank == 0 else None, "remove", rank, gather)

    def sweep(self) -> None:
        """Remove what killed saves and removals left, for rank 0 of the run that owns the folder.

        What cannot be removed, such as a file that a reader on NFS still holds, is logged and left.
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
        sync_folder(partial)
        if self.folder(manifest.step).is_dir():  # one that did not verify
            self._remove(manifest.step)
        partial.rename(self.folder(manifest.step))
        sync_folder(self.root)

    def _remove(self, step: int) -> None:
        # Renamed first, in one move: a half-removed folder is never taken for a checkpoint.
        aside = self.root / f".{self.folder(step).name}.removed"
        self.folder(step).rename(aside)
        self._sound.discard(step)
        sync_folder(self.root)
        shutil.rmtree(aside)

    def _is_sound(self, step: int) -> bool:
        return step in self._sound or not self.verify(step)

    def _problems(self, step: int, rank: int, ranks: int, gather: Gather, slots: Sequence[str] = ()) -> list[str]:
        shares = gather(self.verify(step, (rank, ranks), slots))
        return list(dict.fromkeys(problem for share in shares for problem in share))


def agreed(action: Callable[[], Any], verb: str, rank: int, gather: Gather) -> list[Any]:
    """Run `action` on every rank and return all results; what one rank raises becomes the same RunError on all, a
    StorageError when no rank met anything but the disk's refusal."""
    result = failure = cause = None
    try:
        result = action()
    except OSError as error:
        cause = error
        failure = RunError.from_storage_error(f"rank {rank} could not {verb} the checkpoint: {error.filename}", error)
    except Exception as error:  # any other failure must reach the other ranks too, or they wait for this one
        failure, cause = RunError(f"rank {rank} could not {verb} the checkpoint: {error}"), error
    outcomes = gather((result, failure, isinstance(cause, OSError)))
    failures = sorted((storage, rank) for rank, (_, failure, storage) in enumerate(outcomes) if failure)
    if failures:
        storage, first = failures[0]  # one that is not the disk's comes first
        also = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raised = (StorageError if storage else RunError)(f"{outcomes[first][1]}{also}")
        raised.passing = outcomes[first][1].passing
        raise raised from cause
    return [result for result, *_ in outcomes]
