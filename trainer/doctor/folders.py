"""Folders: whether they can be written and locked, how much room they have, and on what file system they are."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from .finding import Finding

GIB = 2**30
ROOM_GIB = {"runs": 10.0, "TMPDIR": 1.0, "cache": 5.0, "shared memory": 1.0}
"""Below this a folder is called full."""
SHARED = {"9p", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "wekafs"}
"""File systems of several machines."""
LONGEST_TMPDIR = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Bytes of TMPDIR in which the loader's workers can still make their sockets (unix(7), sun_path)."""


def runs_folder(folder: Path) -> list[Finding]:
    """The folder of runs; need not be there yet."""
    return [_folder("runs", folder, locks=True)]


def temporary() -> list[Finding]:
    place = Path(tempfile.gettempdir())
    found = _folder("TMPDIR", place, locks=True)
    if found.verdict == "ok" and len(os.fsencode(place)) > LONGEST_TMPDIR:
        remedy = f"workers make sockets there: set TMPDIR to at most {LONGEST_TMPDIR} bytes, such as one in /tmp"
        return [found._replace(verdict="warning", remedy=remedy)]
    return [found]


def cache() -> list[Finding]:
    """Where the hub's downloads go."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return [_folder("cache", Path(home).expanduser(), locks=True)]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    if not folder.is_dir():
        return [Finding("shared memory", f"{folder} is not there", "warning", "data.workers=0 does without")]
    found = _folder("shared memory", folder, locks=False)
    if found.verdict == "warning":
        return [found._replace(remedy="workers pass batches through it: docker run --shm-size=8g, or data.workers=0")]
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
                remedy = f"flock does not work there ({trouble}): mount it with locks, or take another folder"
                return Finding(what, found, "missing" if what == "runs" else "warning", remedy)
    except OSError as error:
        remedy = f"{error.strerror}: make {there} writable, or name another folder"
        return Finding(what, found, "warning" if what == "cache" else "missing", remedy)
    if free < ROOM_GIB[what]:
        return Finding(what, found, "warning", f"less than {ROOM_GIB[what]:g} GiB: make room")
    return Finding(what, found)


def _lock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system under `folder`, by the longest mount point above it."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return "file system not known"
    place = os.path.realpath(folder)
    best, kind = "", "file system not known"
    for line in lines:
        point = line[1].replace("\\040", " ") if len(line) > 2 else ""
        if point and (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, line[2]
    return f"{kind} (shared)" if kind in SHARED else kind
