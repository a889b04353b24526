"""Nodes not to be used: found bad by preflight, or named in two hung starts; remembered by run, and by the site for
repeat offenders.

Both files hold {"node": {"times": n, "last": unix time, "reason": "…"}}. Deleting an entry brings a node back.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .errors import SlurmError
from .io import read_json, write_json

EXCLUDED = "excluded.json"

log = logging.getLogger(__name__)

LOCK_S = 30.0
"""How long a writer waits for another one."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Memory(Protocol):
    """What a site says about repeat offenders."""

    bad_node_file: str | None
    """File that all runs share; null where the site keeps none."""
    bad_node_threshold: int
    """Runs start without a node that was found bad this many times."""


def excluded(run_folder: Path | None, site: Memory | None) -> list[str]:
    """Nodes that the run found bad, and those that the site's runs found bad `site.bad_node_threshold` times, in order.

    Raises SlurmError naming a file that is not of this form, OSError when it cannot be read.
    """
    names = set(read_exclusions(run_folder / EXCLUDED)) if run_folder else set()
    if site and site.bad_node_file:
        book = read_exclusions(Path(site.bad_node_file).expanduser())
        names |= {node for node, entry in book.items() if entry["times"] >= site.bad_node_threshold}
    return sorted(names)


def exclude(bad: Mapping[str, str], run_folder: Path | None, site: Memory | None) -> None:
    """Add nodes with their reasons to the run's file and to the site's; raises OSError or SlurmError."""
    files = [run_folder / EXCLUDED] if run_folder else []
    if site and site.bad_node_file:
        files.append(Path(site.bad_node_file).expanduser())
    for file in files:
        with _alone(file):
            book = read_exclusions(file)
            for node, reason in bad.items():
                times = book[node]["times"] if node in book else 0
                book[node] = {"times": times + 1, "last": int(time.time()), "reason": reason}
            write_json(file, book)


def read_exclusions(file: Path) -> dict[str, dict[str, Any]]:
    """Node -> {times, last, reason}; empty when there is no such file."""
    try:
        book = read_json(file)
    except ValueError as error:
        raise SlurmError(f"{file}: not valid JSON ({error}); mend or delete it") from error
    book = {} if book is None else book
    sound = isinstance(book, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("times"), int) for entry in book.values()
    )
    if not sound:
        raise SlurmError(f'{file}: want {{"node": {{"times": 1, "last": 0, "reason": ""}}}}; mend or delete it')
    return book


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One writer at a time: jobs of several runs may find bad nodes at the same moment. Where the file system has no
    locks, writers take that chance."""
    deadline = time.monotonic() + LOCK_S
    with open(file.with_name(f".{file.name}.lock"), "a") as lock:
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in NO_LOCKS:
                    log.warning("%s: written without a lock (%s)", file, error.strerror)
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{file}: no lock within {LOCK_S:.0f} s ({error.strerror})") from error
            time.sleep(0.02)
        yield
