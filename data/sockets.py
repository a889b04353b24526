"""Where multiprocessing makes the sockets over which workers pass tensors: their paths have a limit, the kernel's."""

from __future__ import annotations

import os
import sys
import tempfile
from multiprocessing import util

from .errors import DataError

LONGEST_PATH = 107 if sys.platform == "linux" else 103
"""Bytes of a unix socket's path (unix(7), sun_path)."""
FOLDER, SOCKET = len("/pymp-xxxxxxxx"), len("/listener-xxxxxxxx")
"""What multiprocessing adds to the temporary folder's path: a private folder, and each socket in it."""
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def make_socket_folder() -> None:
    """Have this process and the workers that it starts make their sockets where a path is short enough: in TMPDIR, or
    where that is too long (Slurm's folders of a job often are), in a private folder that goes with the process.

    DataError when there is no such place.
    """
    there = tempfile.gettempdir()
    before = tempfile.tempdir
    if not _fits(there, FOLDER + SOCKET):
        tempfile.tempdir = next((name for name in SHORT if os.access(name, os.W_OK | os.X_OK)), there)
    try:
        made = util.get_temp_dir()  # made once, and with mode 0700; kept from then on
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
