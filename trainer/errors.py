"""The trainer's errors for its users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.retry import failure


class RunError(ValueError):
    """Bad input or state that the user can mend; the message is one line: what, where, what to do."""

    passing = False
    """Whether another attempt may succeed with nothing changed."""

    @classmethod
    def of_storage(cls, where: object, error: BaseException) -> RunError:
        """What an error of storage, network or a service at `where` means for a run."""
        told = failure(where, error)
        found = cls(str(told))
        found.passing = told.passing
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
