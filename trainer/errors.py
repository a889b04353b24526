"""Errors that the trainer reports to its users."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data import DataError
from ..data.retry import failure
from ..data.transience import causes, verdict


class RunError(ValueError):
    """Bad input or state that the user can fix; the message is one line: what, where, what to do."""

    transient = False
    """Whether another attempt may succeed with nothing changed."""

    @classmethod
    def from_storage_error(cls, where: object, error: BaseException) -> RunError:
        """RunError for a storage, network or service error at `where`; `transient` is set if a retry may succeed."""
        reason = failure(where, error)
        found = cls(str(reason))
        found.transient = reason.transient
        return found


class Locked(RunError):
    """Another process is running this run."""


class Unreachable(RunError):
    """A service did not answer. Retryable."""

    transient = True


class AlreadyRunning(RunError):
    """Another process is doing the same. Retryable."""

    transient = True


class Unhealthy(RuntimeError):
    """Training cannot usefully continue; the message is one line with the reason."""


class RendezvousTimeout(RuntimeError):
    """A rank missed the rendezvous; the message is one line that names it. Retryable."""


_DISTRIBUTED = {"RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
"""Exception classes raised by torch.distributed; gloo raises plain RuntimeErrors."""
_LOST_RANK = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Connection was likely closed|Broken pipe|Connection refused|"
    r"gloo/.*(Timed out|timeout|Socket closed)|connectFullMesh failed|wait timeout after|Socket Timeout|"
    r"ncclRemoteError|remote process exited|NCCL communicator was aborted",
    re.DOTALL,
)
_DEVICE_FULL = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUDA driver error: out of memory|HIP out of memory|"
    r"(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
_HOST_FULL = re.compile(r"DefaultCPUAllocator: (can't|not enough)|\[enforce fail at alloc_cpu")


def foreseen(error: BaseException) -> Exception | None:
    """A one-line exception with a remedy for an error that is not necessarily a bug: storage, network, a service,
    memory. Its `transient` states whether a retry may succeed. None for other errors; our own are returned as is."""
    if isinstance(error, (RunError, DataError, Unhealthy, RendezvousTimeout)):
        return error
    links = list(causes(error))
    if any(_DEVICE_FULL.search(str(link)) or type(link).__name__ == "OutOfMemoryError" for link in links):
        line = next(str(link) for link in links if _DEVICE_FULL.search(str(link)) or link is error)
        return RunError(
            f"the GPU's memory is full ({_sentence(line)}); lower micro_batch, use more ranks or offload, see"
            " `bifrost plan`, and check for other processes on the GPU"
        )
    full = any(isinstance(link, OSError) and link.errno == errno.ENOMEM for link in links)
    if full or isinstance(error, MemoryError) or any(_HOST_FULL.search(str(link)) for link in links):
        return RunError(
            f"this machine's memory is full ({_sentence(str(error)) or type(error).__name__}); lower micro_batch,"
            " data.workers or data.prefetch, or request more memory"
        )
    if verdict(error) is None:
        return None
    return failure(_place(links), error)


def lost_rank(error: BaseException) -> str | None:
    """One line for a collective or store that failed because another rank exited; None for any other error, also if
    it is the cause."""
    for link in causes(error):
        if type(link).__name__ not in _DISTRIBUTED or not _LOST_RANK.search(str(link)):
            return None
    # gloo's messages start with its source location.
    text = re.sub(r"^\[\S*?:\d+\] ", "", _sentence(str(error)))
    return f"lost the connection to another rank ({text}); the output of the rank that ended first has the cause"


def with_message(error: Exception, text: str) -> Exception:
    """The same error with another message."""
    found = type(error)(text)
    vars(found).update(vars(error))
    return found


def _place(links: list[BaseException]) -> str:
    """The file of an error, or the error's type."""
    names = [link.filename for link in links if isinstance(link, OSError) and link.filename is not None]
    return os.fsdecode(names[0]) if names and not isinstance(names[0], int) else type(links[0]).__name__


def _sentence(text: str) -> str:
    """The first sentence of an error message."""
    return re.split(r"(?<=[a-z\d])\.\s|\n", " ".join(text.split()))[0][:200].rstrip(".")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Convert an OSError while writing a command's result to `place` into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{place}: cannot be written ({error.strerror or error}); fix that or choose another path"
        ) from error
