"""The folder for the Unix sockets over which loader workers pass tensors: the kernel limits the length of a path."""

from __future__ import annotations

import os
import sys
import tempfile
from multiprocessing import util

from .errors import DataError

LONGEST_PATH = 107 if sys.platform == "linux" else 103
"""Bytes of a Unix socket's path (unix(7), sun_path)."""
FOLDER, SOCKET = len("/pymp-xxxxxxxx"), len("/listener-xxxxxxxx")
"""Bytes that multiprocessing appends to the temporary folder's path: a private folder, and a socket in it."""
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def make_socket_folder() -> None:
    """Choose a folder with a short enough path for the sockets of this process and its workers: TMPDIR, or when that
    is too long (Slurm's per-job folders often are), a private folder that is removed when the process exits.

    Raises DataError when there is no such folder.
    """
    there = tempfile.gettempdir()
    before = tempfile.tempdir
    if not _fits(there, FOLDER + SOCKET):
        tempfile.tempdir = next((name for name in SHORT if os.access(name, os.W_OK | os.X_OK)), there)
    try:
        made = util.get_temp_dir()  # created once, with mode 0700, then reused
    finally:
        tempfile.tempdir = before
    if not _fits(made, SOCKET):
        most = LONGEST_PATH - FOLDER - SOCKET
        raise DataError(
            f"TMPDIR={there}: the loader's workers make sockets there, whose paths are too long, and"
            f" {', '.join(SHORT)} cannot be written; set TMPDIR to a folder of at most {most} bytes, or data.workers=0"
        )


def _fits(folder: str, more: int) -> bool:
    return len(os.fsencode(folder)) + more <= LONGEST_PATH
