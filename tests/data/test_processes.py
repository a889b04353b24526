from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from bifrost.data import DataError
from bifrost.data.processes import in_processes, sole_owner


def square(number: int) -> int:
    return number * number


def test_every_result_is_yielded_once():
    assert sorted(in_processes(square, range(20), 2)) == [n * n for n in range(20)]


def die(number: int) -> int:
    os._exit(1)


def refuse(number: int) -> int:
    raise DataError(f"{number}: no")


def test_errors_and_deaths_of_workers_are_raised():
    before = psutil.Process().children()
    with pytest.raises(DataError, match="a worker process died"):
        list(in_processes(die, [1], 1))
    with pytest.raises(DataError, match="3: no"):
        list(in_processes(refuse, [3], 1))
    assert psutil.Process().children() == before


SLEEPERS = """
import time
from bifrost.data.processes import in_processes
list(in_processes(time.sleep, [600, 600], 2))
"""


def test_workers_end_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS])
    deadline = time.monotonic() + 20
    while len(children := psutil.Process(parent.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # until both have called prctl
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_folder_has_one_owner(tmp_path):
    with sole_owner(tmp_path):
        (tmp_path / "x.tar.tmp-1").touch()
        with pytest.raises(DataError, match="another process writes here"), sole_owner(tmp_path):
            pass
    with sole_owner(tmp_path):
        assert not (tmp_path / "x.tar.tmp-1").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: File exists; name a folder"), sole_owner(tmp_path / "file"):
        pass
