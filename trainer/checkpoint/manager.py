"""Asynchronous checkpoints: a thread copies the state to host memory while the next step's passes run, and writes it to
disk. Only the next update waits, until the copy is complete."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...recipes.schema import Checkpoint
from ..distributed.process_group import Group
from ..errors import Unhealthy, lost_rank
from .interval import best_interval, settled
from .local import LocalParts
from .shard import Payload
from .staging import Slots, Staging, now
from .store import StorageError, Store

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Pause before the final save is retried."""


@dataclass
class _Save:
    """One save in progress."""

    step: int
    slots: Slots
    """The live slices; their copy, once it is complete."""
    behind: Any
    """See `staging.now`."""
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    buffers: Mapping[str, Tensor]
    prune: bool
    best: int
    begun: float
    step_s: float | None
    """Seconds per step since the previous save."""
    blocked: float
    """Seconds for which training was blocked: by the copy, and by a thread that was not done in time."""
    copied: threading.Event = field(default_factory=threading.Event)
    """Set when nothing reads the live slices any more."""
    seconds: float = 0.0
    """Seconds until it was on disk."""
    waited_since: float | None = None
    """Time since which training has been waiting for the thread."""
    failure: str | None = None
    """Storage failure."""
    error: BaseException | None = None
    """Any other failure."""


class CheckpointManager:
    """Saves the checkpoints of a run, one at a time; every rank calls it at the same steps.

    group: used by the ranks' threads exclusively. slots: what will be saved, to allocate its memory now. report:
    receives events for the metrics file, on rank 0. every: interval of the previous attempt, for `interval: auto`.
    nodes: number of nodes.
    """

    def __init__(
        self,
        store: Store,
        settings: Checkpoint,
        slots: Slots,
        report: Callable[[Mapping[str, Any]], None],
        group: Group = Group(),
        local: LocalParts | None = None,
        nodes: int = 1,
        every: int | None = None,
    ) -> None:
        self.store = store
        self.local = local
        self.settings = settings
        self.group = group
        self.automatic = settings.interval == "auto"
        self.every = every if every and self.automatic else settings.every
        self._best = self.every
        self._mtbf_s = settings.mtbf_hours * 3600 / nodes
        self._last: tuple[int, float] | None = None  # step of the last save, and when training continued after it
        self._staging = Staging(slots)
        self._report = report
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._failures = 0  # consecutive saves that failed because of storage
        self._warned_slow = False
        self.seconds: deque[float] = deque(maxlen=10)
        """Seconds until each of the last saves was on disk."""

    def due(self, step: int, best: bool = False) -> bool:
        """Whether to save at `step`; the last step and a stop signal save as well. best: the held-out loss is the
        lowest so far."""
        return step % self.every == 0 or (best and self.settings.keep_best)

    def save(
        self,
        step: int,
        slots: Slots,
        shapes: Mapping[str, tuple[int, ...]],
        state: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
        prune: bool = True,
        best: int = -1,
    ) -> None:
        """Begin to copy the arguments of `Store.save` and return; they are written in the background. Waits only for
        the previous save if it is still running. The slices may change after `await_copy`, the rest at once. prune:
        remove old checkpoints once it is written. best: step with the lowest held-out loss, whose checkpoint
        `keep_best` keeps.

        A storage failure is logged, reported as an event and retried at the next save. Raises Unhealthy on every rank
        after `max_failed_saves` consecutive failures, RunError for a permanent error.
        """
        if self._thread is not None and self._thread.is_alive() and not self._warned_slow:
            self._warned_slow = True
            log.warning(
                "the save before step %d is still being written, steps wait for it: raise checkpoint.every (%d)",
                step,
                self.every,
            )
        self.wait()
        begun = time.perf_counter()
        # Copies, since the loop's state and the model's buffers keep changing.
        held = {name: buffer.detach().to("cpu", copy=True).contiguous() for name, buffer in buffers.items()}
        step_s = (begun - self._last[1]) / (step - self._last[0]) if self._last and step > self._last[0] else None
        state = copy.deepcopy(state)
        save = _Save(step, slots, now(slots), shapes, state, held, prune, best, begun, step_s, 0.0)
        self._save = save
        self._start()
        ended = time.perf_counter()
        save.blocked += ended - begun
        self._last = step, ended
        if self._failures + 1 >= self.settings.max_failed_saves:
            self.wait()  # the last attempt: avoid further steps that could not be saved

    @property
    def copying(self) -> bool:
        """Whether the last save still reads the live slices."""
        return self._save is not None and not self._save.copied.is_set()

    def await_copy(self) -> None:
        """Wait until the slices of the last save are copied: before they change."""
        if self._save is not None:
            begun = time.perf_counter()
            self._save.copied.wait()
            self._save.blocked += time.perf_counter() - begun

    def wait(self) -> None:
        """Wait for the current save. Raises its errors, as `save` does."""
        save = self._join()
        if save is not None and save.error is not None:
            raise save.error
        if self._best != self.every:
            # All ranks have waited for the same save, so they change at the same step.
            log.info("saving every %d steps from now on, instead of every %d", self._best, self.every)
            self._report({"event": "checkpoint_interval", "step": save.step if save else 0, "every": self._best})
            self.every = self._best
        if self._failures >= self.settings.max_failed_saves:
            assert save is not None
            raise Unhealthy(f"{self._failures} saves in a row failed, the last at step {save.step}: {save.failure}")

    def finish(self) -> None:
        """Wait until the last save is on disk, with as many retries as `max_failed_saves` allows."""
        self.wait()
        while self._save is not None and self._save.failure:
            time.sleep(RETRY_S)
            self._save.failure = None
            self._start()
            self.wait()

    def abandon(self, timeout_s: float) -> None:
        """For a failed run: give the current save, whose content is valid, some time to finish. Does not raise."""
        self._join(timeout_s)

    def _start(self) -> None:
        # A daemon thread: a failing process does not wait for its disk.
        self._thread = threading.Thread(target=self._write, args=(self._save,), name="save", daemon=True)
        self._thread.start()

    def _join(self, timeout_s: float | None = None) -> _Save | None:
        if self._save is not None and self._thread is not None:
            self._save.waited_since = time.perf_counter()
            self._thread.join(timeout_s)
        return self._save

    def _write(self, save: _Save) -> None:
        try:
            self._copy(save)
            content = Payload(self.group.rank, self.group.size, save.slots, save.shapes, save.state, save.buffers)
            near = None
            if self.local and self.local.save(save.step, content, self.group.gather):
                near = time.perf_counter() - save.begun
            size = self.store.save(save.step, content, self.group.gather)
            self._failures = 0
            self._report_save(save, size, near)
            if self.local:
                self.local.clear()
            if self.automatic and size:
                self._best = self.group.gather(self._better(save))[0]
        except StorageError as error:
            self._failures += 1
            save.failure = str(error)
            log.error("checkpoint of step %d not saved: %s", save.step, error)
            self._report(
                {
                    "event": "save_failed",
                    "step": save.step,
                    "reason": save.failure,
                    "consecutive_failures": self._failures,
                }
            )
        except BaseException as error:  # raised in the training thread, at the next save
            save.error = error
            # A lost rank is reported once per run.
            level = logging.INFO if lost_rank(error) else logging.ERROR
            log.log(level, "checkpoint of step %d not saved: %s", save.step, error)
        else:
            if save.prune:
                self._prune({save.best} if self.settings.keep_best else set())

    def _copy(self, save: _Save) -> None:
        if not save.copied.is_set():
            try:
                save.slots = self._staging.take(save.slots, save.behind)
            finally:
                save.copied.set()

    def _report_save(self, save: _Save, size: int, near: float | None) -> None:
        now = time.perf_counter()
        if save.waited_since is not None:
            save.blocked += now - save.waited_since
        save.seconds = seconds = now - save.begun
        self.seconds.append(seconds)
        rate = size / 2**30 / seconds
        self._report(
            {
                "event": "checkpoint",
                "step": save.step,
                "seconds": seconds,
                "blocked_s": save.blocked,
                "bytes": size,
                "gib_per_s": rate,
                **({} if near is None else {"local_s": near}),
            }
        )
        log.info(
            "checkpoint of step %d: %.3g GiB in %.2f s (%.2f GiB/s), training waited %.3f s",
            save.step,
            size / 2**30,
            seconds,
            rate,
            save.blocked,
        )

    def _better(self, save: _Save) -> int:
        if save.step_s is None:
            return self.every
        return settled(self.every, best_interval(save.blocked, save.seconds, save.step_s, self._mtbf_s))

    def _prune(self, spared: Collection[int]) -> None:
        """Remove old checkpoints; errors do not end the run."""
        if self.group.rank == 0:
            try:
                self.store.prune(self.settings.keep, spared)
            except Exception:
                log.exception("old checkpoints could not be removed, training continues")
