"""The process group: rank, size, device, and the few collectives that the loop itself needs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ...slurm.rank_env import UNBIND, host_name
from ..errors import RunError, Unhealthy, foreseen, with_message
from .gather import Gather, single_process
from .open_files import allow_open_files
from .rendezvous import connect, interruptible, join_store, require_agent, wait_for_all

T = TypeVar("T")
BACKGROUND = "background"
"""Description of the process groups of `Ranks.background_group`."""

_SINGLE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class Group:
    """Ranks that exchange objects on a process group of their own: this one's number, how many they are, their
    gather."""

    rank: int = 0
    size: int = 1
    gather: Gather = single_process


@dataclass(frozen=True)
class Ranks:
    """Rank and size of the run, and this rank's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list:
        """Every rank's `value`, in order of rank. If another rank's `agreed` has failed, that error is raised."""
        return self._exchange(value, None)

    def broadcast(self, value: object) -> Any:
        """Rank 0's `value`, on every rank. If another rank's `agreed` has failed, that error is raised."""
        self._exchange(None, None)
        values = [value if self.first else None]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def _exchange(self, value: object, failure: Exception | None) -> list:
        if self.size > 1:
            answers: list = [None] * self.size
            dist.all_gather_object(answers, (value, failure))
        else:
            answers = [(value, failure)]
        for _, failed in answers:
            if failed is not None:
                failed.agreed = True
                raise failed
        return [each for each, _ in answers]

    def agreed(self, action: Callable[[], T]) -> T:
        """The result of `action`, which may gather; an error on one rank is raised on all, so that none waits forever.

        A failed rank sends its error with the next gather, whichever one the others have reached, and all raise it
        there. Other collectives (DeepSpeed's, sums, barriers) do not carry errors, so an action must not call them. An
        unforeseen error is raised unchanged on its own rank and as Unhealthy on the others.
        """
        try:
            result = action()
        except Exception as error:
            if getattr(error, "agreed", False):
                raise
            described = foreseen(error)
            if described is None:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                described = Unhealthy(f"rank {self.rank}: startup failed with {what}; its traceback is in its output")
            elif described is not error and self.size > 1:
                described = with_message(described, f"rank {self.rank}: {described}")
            try:
                self._exchange(None, described)
            except Exception as first:
                if first is error or (isinstance(described, Unhealthy) and not isinstance(error, Unhealthy)):
                    raise error from None
                raise first from (error if str(first) == str(described) else None)
            raise
        self._exchange(None, None)
        return result

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the ranks, in fp64: exact for counts and for integers below 2^53."""
        vector = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(vector)
        return vector.tolist()

    def background_group(self) -> Group:
        """All ranks, with a process group of its own, so that a thread can wait in it while training continues.

        A collective: every rank calls this at the same point. The group uses gloo and waits up to a day for a slow
        rank; a dead one is detected at once.
        """
        if self.size == 1:
            return Group()
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1), group_desc=BACKGROUND)

        def gather(value: object) -> list:
            values: list = [None] * self.size
            dist.all_gather_object(values, value, group=group)
            return values

        return Group(self.rank, self.size, gather)

    def rows(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's `values`, as many on each, in order of rank: exact, by one sum over the ranks."""
        width = len(values)
        slots = [0.0] * (width * self.size)
        slots[self.rank * width : (self.rank + 1) * width] = values
        total = self.total(slots)
        return [total[start : start + width] for start in range(0, len(total), width)]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join(timeout: timedelta = timedelta(minutes=30), wait_s: float = 300, cpu: bool = False) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE and LOCAL_RANK describe; a single process without them.

    timeout: of each collective. wait_s: seconds in which all ranks must join, else RendezvousTimeout names the missing;
    and seconds in which they must then connect to each other. cpu: for work without a GPU, of as many ranks as wanted.
    """
    # Keeps the last collectives for hang reports (monitors/stacks.py).
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    # torch ends a process whose NCCL thread has been silent for so long, by default 480 s: earlier than the watchdog,
    # whose report names the rank and the phase, and which allows for a slow start or save.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout.total_seconds())))
    # DeepSpeed reads these too.
    rank, size, local = (int(os.environ.setdefault(*d)) for d in _SINGLE)
    if dist.is_initialized():
        return Ranks(rank, size, _device(rank, local, cpu))
    if size == 1:
        device, store = _device(rank, local, cpu), HashStore()
    elif "TORCHELASTIC_RUN_ID" in os.environ and "BIFROST_RENDEZVOUS" not in os.environ:
        # torchrun has had its own rendezvous, in a store that may still hold keys of an earlier attempt.
        require_agent(rank)
        device, store = _prepare(rank, size, local, cpu), None
    else:
        # Before the device is touched: a broken one may hang.
        store = interruptible(partial(join_store, rank, size, wait_s))
        problem = ""
        try:
            device = _prepare(rank, size, local, cpu)
        except RunError as error:
            device, problem = torch.device("cpu"), str(error)
        interruptible(partial(wait_for_all, store, rank, size, wait_s, problem))
        store.set_timeout(timeout)
    # With the device named, NCCL connects here, where a fault has a message, not in the first collective.
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    start = partial(
        dist.init_process_group, backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound
    )
    if size == 1:
        start()
    elif store is None:
        interruptible(start)
    else:
        connect(start, size, wait_s, backend)
    return Ranks(rank, size, device)


def _prepare(rank: int, size: int, local: int, cpu: bool) -> torch.device:
    """This process's device; RunError where it does not see it, or may not open enough files for `size` ranks."""
    allow_open_files(size)
    return _device(rank, local, cpu)


def _device(rank: int, local: int, cpu: bool = False) -> torch.device:
    """The device of local rank `local`; RunError where this process does not see it."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= (seen := torch.cuda.device_count()):
        gpus = "1 GPU" if seen == 1 else f"{seen} GPUs"
        raise RunError(f"rank {rank} on {host_name()} is number {local} there and sees {gpus}: {UNBIND}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
