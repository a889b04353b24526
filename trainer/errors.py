"""The trainer's errors for its users."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAY_PASS = {
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EIO,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""What storage answers while it is away, a network file system's server above all."""


class RunError(ValueError):
    """Bad input or state that the user can mend; the message is one line: what, where, what to do."""

    passing = False
    """Whether another start may well go on with nothing mended."""

    @classmethod
    def of_storage(cls, where: object, error: OSError) -> RunError:
        """What an operating system's error at `where` means for a run."""
        passing = error.errno in MAY_PASS
        remedy = "check the storage" if passing else "free disk space or mend the folder's permissions"
        found = cls(f"{where}: {error.strerror}; {remedy}")
        found.passing = passing
        return found


class Locked(RunError):
    """Another start of the run is alive."""


class Unhealthy(RuntimeError):
    """Training cannot usefully go on; the message is one line with the reason."""


class Unmet(RuntimeError):
    """A rank of this start did not come; the message is one line that names it. To be started again."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes a command's result to `place`: that it cannot is a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{place}: cannot be written ({error}); mend that or name another place") from error
