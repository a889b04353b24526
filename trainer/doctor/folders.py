"""Checks of folders: write access, locks, free space, file system."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from .finding import Finding

GIB = 2**30
MIN_FREE_GIB = {"runs": 10.0, "TMPDIR": 1.0, "cache": 5.0, "shared memory": 1.0}
"""Minimum free space without a warning."""
SHARED = {"9p", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "wekafs"}
"""File systems that several machines share."""
LONGEST_TMPDIR = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Maximum bytes of TMPDIR, in which the loader's workers create sockets (unix(7), sun_path)."""


def runs_folder(folder: Path) -> list[Finding]:
    """The folder of runs, which need not exist yet."""
    return [_folder("runs", folder, locks=True)]


def temporary() -> list[Finding]:
    place = Path(tempfile.gettempdir())
    found = _folder("TMPDIR", place, locks=True)
    if found.verdict == "ok" and len(os.fsencode(place)) > LONGEST_TMPDIR:
        remedy = f"too long for the workers' sockets: set TMPDIR to a path of at most {LONGEST_TMPDIR} bytes"
        return [found._replace(verdict="warning", remedy=remedy)]
    return [found]


def cache() -> list[Finding]:
    """The folder of downloads from the Hugging Face hub."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return [_folder("cache", Path(home).expanduser(), locks=True)]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    if not folder.is_dir():
        return [Finding("shared memory", f"{folder} does not exist", "warning", "set data.workers=0")]
    found = _folder("shared memory", folder, locks=False)
    if found.verdict == "warning":
        return [
            found._replace(remedy="workers pass batches through it: docker run --shm-size=8g, or set data.workers=0")
        ]
    return [found]


def _folder(what: str, folder: Path, locks: bool) -> Finding:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    kind = file_system(there)
    free = shutil.disk_usage(there).free / GIB
    found = f"{folder}, {kind}, {free:,.1f} GiB free"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".bifrost-doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            if locks and (trouble := _lock(file.fileno())):
                remedy = f"flock does not work there ({trouble}): mount it with locks, or use another folder"
                return Finding(what, found, "missing" if what == "runs" else "warning", remedy)
    except OSError as error:
        remedy = f"{error.strerror}: make {there} writable, or use another folder"
        return Finding(what, found, "warning" if what == "cache" else "missing", remedy)
    if free < MIN_FREE_GIB[what]:
        return Finding(what, found, "warning", f"less than {MIN_FREE_GIB[what]:g} GiB: free some space")
    return Finding(what, found)


def _lock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def file_system(folder: Path) -> str:
    """Type of the file system of `folder`, that of the longest mount point above it."""
    place = Path(os.path.realpath(folder))
    found = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    if not found:
        return "unknown file system"
    kind = max(found, key=lambda one: len(one.mountpoint)).fstype
    return f"{kind} (shared)" if kind in SHARED else kind
