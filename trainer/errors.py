"""The trainer's errors for its users."""

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
    """Bad input or state that the user can mend; the message is one line: what, where, what to do."""

    passing = False
    """Whether another attempt may succeed with nothing changed."""

    @classmethod
    def from_storage_error(cls, where: object, error: BaseException) -> RunError:
        """What an error of storage, network or a service at `where` means for a run."""
        told = failure(where, error)
        found = cls(str(told))
        found.passing = told.passing
        return found


class Locked(RunError):
    """Another start of the run is alive."""


class Unreachable(RunError):
    """A service did not answer; another attempt may succeed."""

    passing = True


class AlreadyRunning(RunError):
    """Another process does the same at this moment."""

    passing = True


class Unhealthy(RuntimeError):
    """Training cannot usefully go on; the message is one line with the reason."""


class RendezvousTimeout(RuntimeError):
    """A rank of this start did not come; the message is one line that names it. To be started again."""


_DISTRIBUTED = {"RuntimeError", "DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
"""Classes of the errors that torch.distributed raises; gloo's are plain RuntimeErrors."""
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
    """One line with what to do, as an exception that says whether another attempt may succeed, for an error that no
    bug need be behind: storage, network, a service, memory. None for any other. Our own errors are returned as they
    are."""
    if isinstance(error, (RunError, DataError, Unhealthy, RendezvousTimeout)):
        return error
    links = list(causes(error))
    if any(_DEVICE_FULL.search(str(link)) or type(link).__name__ == "OutOfMemoryError" for link in links):
        line = next(str(link) for link in links if _DEVICE_FULL.search(str(link)) or link is error)
        return RunError(
            f"the GPU's memory is full ({_sentence(line)}); lower micro_batch, take more ranks or offload, see"
            " `bifrost plan`, and look for other processes on the GPU"
        )
    full = any(isinstance(link, OSError) and link.errno == errno.ENOMEM for link in links)
    if full or isinstance(error, MemoryError) or any(_HOST_FULL.search(str(link)) for link in links):
        return RunError(
            f"this machine's memory is full ({_sentence(str(error)) or type(error).__name__}); lower micro_batch,"
            " data.workers or data.prefetch, or ask for more memory"
        )
    if verdict(error) is None:
        return None
    return failure(_place(links), error)


def lost_rank(error: BaseException) -> str | None:
    """One line on a collective or a store that broke because another rank is gone; None for any other error, and where
    another one is behind it."""
    for link in causes(error):
        if type(link).__name__ not in _DISTRIBUTED or not _LOST_RANK.search(str(link)):
            return None
    # gloo begins with the place in its own source.
    text = re.sub(r"^\[\S*?:\d+\] ", "", _sentence(str(error)))
    return f"lost the connection to another rank ({text}); the output of the rank that ended first has the cause"


def with_message(error: Exception, text: str) -> Exception:
    """The same error with another text."""
    found = type(error)(text)
    vars(found).update(vars(error))
    return found


def _place(links: list[BaseException]) -> str:
    """The file that an error is about, or its kind."""
    names = [link.filename for link in links if isinstance(link, OSError) and link.filename is not None]
    return os.fsdecode(names[0]) if names and not isinstance(names[0], int) else type(links[0]).__name__


def _sentence(text: str) -> str:
    """The first sentence of an error's text."""
    return re.split(r"(?<=[a-z\d])\.\s|\n", " ".join(text.split()))[0][:200].rstrip(".")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes a command's result to `place`: that it cannot is a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{place}: cannot be written ({error}); mend that or name another place") from error
