"""The checkpoint formats that `bifrost bench checkpoint` compares: ours, DeepSpeed's, and torch DCP's, of one engine's
state on the ranks of one process group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ...recipes.schema import Checkpoint
from ..checkpoint.manager import CheckpointManager
from ..checkpoint.state import capture, restore
from ..checkpoint.store import Store
from ..distributed.process_group import Group, Ranks
from ..errors import RunError
from ..optim.engine import Engine

STEP = 1


class Saving(NamedTuple):
    """A save whose call has returned."""

    await_copy: Callable[[], object] = lambda: None
    """Returns when the state may change."""
    finish: Callable[[], object] = lambda: None
    """Returns when the save is complete: also durable, where the format flushes its files."""


class Format(Protocol):
    """A checkpoint format. `ready()` allocates what a run allocates once; `save` and `load` are called within it."""

    name: str
    flushed: bool
    """Whether a complete save has been flushed to disk (fsync)."""
    verified: bool
    """Whether a load compares the bytes with hashes."""

    def ready(self) -> AbstractContextManager[Any]: ...

    def save(self, folder: Path) -> Saving: ...

    def load(self, folder: Path) -> None: ...


class Own:
    """This project's checkpoints: saved in the background, verified and loaded."""

    name, flushed, verified = "bifrost", True, True

    def __init__(self, engine: Engine, ranks: Ranks, group: Group) -> None:
        self.engine, self.ranks, self.group = engine, ranks, group
        self._manager: CheckpointManager | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        slots = capture(self.engine, None)[0]
        self._manager = CheckpointManager(Store("."), Checkpoint(), slots, lambda event: None, self.group)
        yield
        self._manager = None  # releases its memory

    def save(self, folder: Path) -> Saving:
        manager = self._manager
        assert manager is not None
        manager.store = Store(folder)
        manager.save(STEP, *capture(self.engine, None), {"updates": 1}, {})
        return Saving(manager.await_copy, manager.finish)

    def load(self, folder: Path) -> None:
        ranks = self.ranks
        reader = Store(folder).newest_verified((), ranks.rank, ranks.size, ranks.gather, while_loaded=True)
        if reader is None or any(ranks.gather(restore(self.engine, None, reader, 1))):
            raise RunError(f"{folder}: the checkpoint just saved does not verify")


class DeepSpeed:
    """DeepSpeed's `save_checkpoint` and `load_checkpoint`. They also store and set the compute weights' metadata."""

    name, flushed, verified = "DeepSpeed", False, False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, folder: Path) -> Saving:
        self.engine.deepspeed.save_checkpoint(str(folder), tag=str(STEP), save_latest=False)
        return Saving()

    def load(self, folder: Path) -> None:
        self.engine.deepspeed.load_checkpoint(str(folder), tag=str(STEP))


class Dcp:
    """torch.distributed.checkpoint's `save` and `load`."""

    name, flushed, verified = "DCP", True, False

    def __init__(self, engine: Engine, ranks: Ranks, group: Any) -> None:
        self.engine, self.rank, self.group = engine, ranks.rank, group

    def state(self) -> dict[str, Any]:
        """The slices as plain tensors, under names of their own on each rank: `async_save` refuses two DTensors in one
        storage (torch 2.13), as DeepSpeed's slices are."""
        slots = capture(self.engine, None)[0]
        return {f"{self.rank}/{slot}/{name}": slice_ for slot, held in slots.items() for name, slice_ in held.items()}

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, folder: Path) -> Saving:
        state_dict_saver.save(self.state(), checkpoint_id=folder, process_group=self.group)
        return Saving()

    def load(self, folder: Path) -> None:
        state_dict_loader.load(self.state(), checkpoint_id=folder, process_group=self.group)


class DcpAsync(Dcp):
    """Its `async_save`. keep: with a stager that keeps its memory between saves; by default each save allocates it."""

    def __init__(self, engine: Engine, ranks: Ranks, group: Any, keep: bool) -> None:
        super().__init__(engine, ranks, group)
        self.name = "DCP async, stager kept" if keep else "DCP async"
        self.keep = keep
        self._stager: DefaultStager | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        if self.keep:
            self._stager = DefaultStager(StagingOptions(False, False, False, False))  # the default's options
            self._stager.stage(self.state())
        yield
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def save(self, folder: Path) -> Saving:
        saving: Any = state_dict_saver.async_save(
            self.state(), checkpoint_id=folder, process_group=self.group, async_stager=self._stager
        )
        return Saving(finish=saving.result)
