"""CI skips no test silently and checks the pins of dependencies."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SKIPPING = """
import pytest
pytest.importorskip("no_such_module_{at}") if {at} == 1 else None

@pytest.fixture
def cluster():
    pytest.skip("slurmctld not found")

@pytest.mark.skipif({at} == 2, reason="no shellcheck")
def test_marked(): pass

def test_with_cluster(cluster): pass

@pytest.mark.skipif(True, reason="needs a CUDA device")
def test_gpu(): pass

@pytest.mark.xfail
def test_known(): assert False
"""


@pytest.mark.parametrize("required", ["", "1"])
def test_ci_skips_only_gpu_tests(tmp_path: Path, required: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for at in range(3):
        (tmp_path / f"test_{at}.py").write_text(SKIPPING.format(at=at))
    options = [
        "-q",
        "-rEf",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir=.",
        "--continue-on-collection-errors",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "."],
        cwd=tmp_path,
        env={**os.environ, "REQUIRE_TESTS": required, "PYTEST_ADDOPTS": "", "CI": ""},
        capture_output=True,
        text=True,
    )
    failed = re.findall(r"^(?:ERROR|FAILED) (\S+)", ended.stdout, flags=re.M)
    wanted = ["test_0.py::test_with_cluster", "test_1.py", "test_2.py::test_marked", "test_2.py::test_with_cluster"]
    assert sorted(failed) == (wanted if required else []), ended.stdout
    assert ended.stdout.count("slurmctld not found") == (2 if required else 0)


def test_ci_requires_all_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^REQUIRE_TESTS=1 make test-all$", script, flags=re.M)
    assert re.search(r"^\.venv/bin/python \.ci/resolve\.py$", script, flags=re.M)
    assert re.search(r"^make lint\nmake docs$", script, flags=re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert "--fail-on-warning" in makefile.split("\ndocs:")[1].split("\n\n")[0], "a broken link must fail"


def test_ci_fails_when_slurm_is_missing_and_cannot_be_installed(tmp_path: Path) -> None:
    """With a PATH that has only basic tools and a Slurm without one of its programs."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    script = (tmp_path / ".ci" / "run").read_text()
    (tmp_path / ".ci" / "run").write_text(script.replace('PATH="$PATH:/usr/sbin:/sbin"', ""))
    for name in ("slurmctld", "slurmd", "munged", "shellcheck", "g++", "make"):
        (tmp_path / name).write_text("#!/bin/sh\necho made\n")
    (tmp_path / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    for name in ("bash", "dirname", "id", "tr", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    ended = subprocess.run(
        ["bash", ".ci/run"], cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: the tests need programs that are not installed: sbatch \n"


def test_unpinned_dependency_is_named() -> None:
    unpinned = runpy.run_path(str(ROOT / ".ci" / "resolve.py"))["unpinned"]
    pins = "Flask==3.1.3\ntorch==2.13.0; python_version >= '3.11'\n"
    assert unpinned("flask==3.1.3\ntorch==2.13.0\nnvidia-cublas==13.1\n", pins) == ""
    assert (
        unpinned("flask==3.1.3\nnodeenv==1.12.0\nlazy-thing==2\n", pins)
        == "constraints.txt does not pin lazy-thing, nodeenv"
    )
