"""Child processes that end with their parent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeVar

from .errors import DataError
from .local import names_in, with_retries

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of flock on file systems without locks."""
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent (process id `parent`) ends, even by SIGKILL. Linux only; a
    no-op elsewhere."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if parent != os.getppid():  # it ended before the call above
            os._exit(1)


def die_with_launcher() -> None:
    """`die_with_parent` for a process started by multiprocessing."""
    launcher = parent_process()
    assert launcher is not None and launcher.pid is not None
    die_with_parent(launcher.pid)


def _start() -> None:
    die_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], processes: int | None) -> Iterator[Result]:
    """Yield results of `work` over `tasks` in order of completion, from `processes` processes (None: one per usable
    core).

    When the loop is left early, by an error or Ctrl-C, the processes end after their current task. Raises DataError
    when one of them dies.
    """
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    pool = ProcessPoolExecutor(processes or usable, mp_context=get_context(START_METHOD), initializer=_start)
    try:
        for future in as_completed([pool.submit(work, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError("a worker process died (out of memory?); run the same command again to resume") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def from_process(produce: Callable[..., Iterable[Result]], *arguments: object) -> Iterator[Result]:
    """The items of `produce(*arguments)`, which a process of its own makes ahead of the caller, as far as a pipe holds
    them.

    An exception there is raised here. When the loop is left early, the process ends. Raises DataError when it dies.
    """
    context = get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(sender, produce, arguments), daemon=True)
    process.start()
    sender.close()  # so that the end of the process ends the pipe
    try:
        while True:
            item, error, more = receiver.recv()
            if error is not None:
                raise error
            if not more:
                return
            yield item
    except EOFError:
        raise DataError("a worker process died (out of memory?); run the same command again") from None
    finally:
        receiver.close()
        process.kill()
        process.join()


def _send_all(sender: Connection, produce: Callable[..., Iterable[object]], arguments: tuple[object, ...]) -> None:
    _start()
    try:
        for item in produce(*arguments):
            sender.send((item, None, True))
        sender.send((None, None, False))
    except BrokenPipeError:
        pass  # the caller has left
    except Exception as error:
        sender.send((None, error, False))


@contextmanager
def sole_owner(folder: Path) -> Iterator[None]:
    """Create the folder and lock it for this process; raises DataError when another process holds it. Also removes the
    temporary files of a killed predecessor.

    A file system without locks (Lustre without `-o flock`, some NFS and FUSE mounts) is used unlocked, with a warning:
    files are renamed into place atomically, and only temporary files of dead processes are removed.
    """
    try:
        with_retries(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
        lock = with_retries(lambda: open(folder / ".lock", "w"), folder)  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; name a folder that can be written") from None
    with lock:
        import psutil

        try:
            locked = with_retries(lambda: _lock(lock, folder), folder)
        except OSError as error:
            raise DataError(f"{folder}: cannot be locked ({error.strerror}); name another folder") from None
        for name in names_in(folder):
            _, temporary, owner = name.partition(".tmp-")
            host, _, process = owner.rpartition("-")
            if temporary and (locked or (host == platform.node() and not psutil.pid_exists(int(process)))):
                with_retries(lambda name=name: (folder / name).unlink(missing_ok=True), folder)
        yield


def _lock(file: IO[str], folder: Path) -> bool:
    """Lock an open file without waiting; False on a file system without locks, with a warning. Raises DataError when
    another process holds the lock, OSError if the lock fails."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise DataError(f"{folder}: another process writes here; wait for it or end it") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        _warn_of_no_locks(folder)
        return False


_warned: set[int] = set()


def _warn_of_no_locks(folder: Path) -> None:
    device = folder.stat().st_dev
    if device not in _warned:
        _warned.add(device)
        log.warning("%s: the file system has no locks; make sure that no other process writes to this folder", folder)
