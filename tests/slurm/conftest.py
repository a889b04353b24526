"""A real Slurm cluster of two nodes for the tests of this folder; one a test process."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bifrost.slurm import devcluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Folder of a running cluster, whose slurm.conf Slurm's commands use as long as it lives."""
    if missing := devcluster.missing_programs():
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    # Slurm's sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name) / "cluster"
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(devcluster.up(folder, 2))
        yield folder
        devcluster.down(folder)
        os.environ.pop("SLURM_CONF")
        if before:
            os.environ["SLURM_CONF"] = before
