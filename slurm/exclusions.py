"""Excluded nodes: found bad by preflight, or suspected in two hung attempts; recorded per run and, for nodes that are
found bad repeatedly, per site.

Both files hold {"node": {"times": n, "last": unix time, "reason": "…"}}. Deleting an entry re-admits the node.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.processes import WITHOUT_LOCKS
from .errors import SlurmError
from .io import read_json, write_json
from .site import Site

EXCLUDED = "excluded.json"

log = logging.getLogger(__name__)

LOCK_S = 30.0
"""How long a writer waits for the lock."""


def excluded(run_folder: Path | None, site: Site | None) -> list[str]:
    """Nodes that the run found bad, and those that the site's runs found bad `site.bad_node_threshold` times, in order.

    Raises SlurmError for a malformed file, OSError if it cannot be read.
    """
    names = set(read_exclusions(run_folder / EXCLUDED)) if run_folder else set()
    if site and site.bad_node_file:
        book = read_exclusions(Path(site.bad_node_file))
        names |= {node for node, entry in book.items() if entry["times"] >= site.bad_node_threshold}
    return sorted(names)


def exclude(bad: Mapping[str, str], run_folder: Path | None, site: Site | None) -> None:
    """Add nodes with their reasons to the run's file and the site's. Raises OSError or SlurmError."""
    files = [run_folder / EXCLUDED] if run_folder else []
    if site and site.bad_node_file:
        files.append(Path(site.bad_node_file))
    for file in files:
        with _locked(file):
            book = read_exclusions(file)
            for node, reason in bad.items():
                times = book[node]["times"] if node in book else 0
                book[node] = {"times": times + 1, "last": int(time.time()), "reason": reason}
            write_json(file, book)


def read_exclusions(file: Path) -> dict[str, dict[str, Any]]:
    """Node -> {times, last, reason}; empty if there is no such file."""
    try:
        book = read_json(file)
    except ValueError as error:
        raise SlurmError(f"{file}: not valid JSON ({error}); fix or delete it") from error
    book = {} if book is None else book
    sound = isinstance(book, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("times"), int) for entry in book.values()
    )
    if not sound:
        raise SlurmError(f'{file}: want {{"node": {{"times": 1, "last": 0, "reason": ""}}}}; fix or delete it')
    return book


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock `file` for writing: jobs of several runs may find bad nodes at the same time. On a file system without
    locks, continue without one and warn."""
    deadline = time.monotonic() + LOCK_S
    with open(file.with_name(f".{file.name}.lock"), "a") as lock:
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in WITHOUT_LOCKS:
                    log.warning("%s: written without a lock (%s)", file, error.strerror)
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{file}: no lock within {LOCK_S:.0f} s ({error.strerror})") from error
            time.sleep(0.02)
        yield
