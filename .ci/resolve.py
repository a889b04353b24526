"""Resolve setup.py under constraints.txt from PyPI alone, for every supported Python and both builds of torch.

    .venv/bin/python .ci/resolve.py

Finds the versions that `pip install -c constraints.txt -e ".[test,lint,docs]"` would install on Linux, with uv and the
metadata of releases: downloads a few megabytes and needs only one interpreter. Ignores this machine's settings of pip
and uv. On exit code 1, prints the Python version, the build of torch and the conflict.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools  # noqa: F401  # isort: skip  # first: it provides distutils, which Python 3.12 removed
from distutils.core import run_setup  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "x86_64-manylinux_2_28"
EXTRAS = ("test", "lint", "docs", "s3")
SOURCE_ONLY = ("antlr4-python3-runtime", "deepspeed")
"""Dependencies without a wheel on PyPI; anything else that would have to be compiled is a conflict."""
CPU_TORCH_REQUIRES = ("filelock", "typing-extensions>=4.10", "setuptools", "sympy", "networkx", "jinja2", "fsspec")
"""Requirements of torch's CPU build, without CUDA libraries and Triton. The build itself is only on PyTorch's index."""
PINNED_BY_TORCH = re.compile(r"(nvidia|cuda)-|setuptools$")


def main() -> int:
    described = run_setup(str(ROOT / "setup.py"), stop_after="init")
    pythons = [found[1] for each in described.get_classifiers() if (found := re.fullmatch(r".*:: (3\.\d+)", each))]
    wanted = [*described.install_requires, *(one for extra in EXTRAS for one in described.extras_require[extra])]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert pythons, "setup.py names no Python"
    cases = [(python, build) for python in pythons for build in ("cuda", "cpu")]
    failed = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(4) as pool:
        folder = Path(name)
        (folder / "wanted.txt").write_text("\n".join(wanted), encoding="utf-8")
        (folder / "cuda.toml").touch()
        (folder / "cpu.toml").write_text(cpu_torch(pins), encoding="utf-8")
        for (python, build), trouble in zip(
            cases, pool.map(lambda case: check(folder, *case, pins), cases), strict=True
        ):
            print(f"Python {python}, torch for {build.upper():4}  {trouble or 'resolves'}", flush=True)
            failed += bool(trouble)
    return 1 if failed else 0


def cpu_torch(pins: str) -> str:
    """Settings for uv that give the pinned torch the requirements of its CPU build."""
    version = re.search(r"^torch==([\w.]+)", pins, flags=re.M)
    assert version, "constraints.txt pins no torch"
    requires = ", ".join(f'"{each}"' for each in CPU_TORCH_REQUIRES)
    return f'[[dependency-metadata]]\nname = "torch"\nversion = "{version[1]}"\nrequires-dist = [{requires}]\n'


def check(folder: Path, python: str, build: str, pins: str) -> str:
    """Resolve folder/wanted.txt; returns the conflict or the unpinned packages, or an empty string."""
    resolved = folder / f"{python}-{build}.txt"
    command = [Path(sys.executable).parent / "uv", "pip", "compile", folder / "wanted.txt"]
    command += ["--config-file", folder / f"{build}.toml"]
    command += ["--python-version", python, "--python-platform", PLATFORM, "-c", ROOT / "constraints.txt"]
    command += ["--only-binary", ":all:", *(word for name in SOURCE_ONLY for word in ("--no-binary", name))]
    command += ["--no-annotate", "--no-header", "--quiet", "-o", resolved]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    ended = subprocess.run([str(word) for word in command], env=kept, capture_output=True, text=True, timeout=600)
    if ended.returncode:
        return f"does not resolve:\n{ended.stderr or ended.stdout}"
    return unpinned(resolved.read_text(encoding="utf-8"), pins)


def unpinned(resolved: str, pins: str) -> str:
    """A message with the resolved packages that are not pinned, whose next release could break an installation."""
    chosen, pinned = (
        {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", text, flags=re.M)}
        for text in (resolved, pins)
    )
    missing = sorted(name for name in chosen - pinned if not PINNED_BY_TORCH.match(name))
    return f"constraints.txt does not pin {', '.join(missing)}" if missing else ""


if __name__ == "__main__":
    sys.exit(main())
