"""Checkpoints held for a reader that is slower than the run that prunes them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def hold(checkpoint: Path, held: Path) -> bool:
    """Link the files of `checkpoint` in the new folder `held`, where they remain when the run prunes it; on a file
    system without hard links they are copied. False, and no folder, if it has been pruned."""
    held.mkdir(parents=True)
    try:
        for path in list(checkpoint.iterdir()):
            _link(path, held / path.name)
    except FileNotFoundError:
        shutil.rmtree(held)
        return False
    return True


def _link(path: Path, held: Path) -> None:
    try:
        os.link(path, held)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):  # file systems without hard links
            raise
        shutil.copy2(path, held)
