"""Build the device of `cuda.cpp`, and load it into this process. Imports no torch: the device has to be there first."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import RunError

SOURCE = Path(__file__).with_name("cuda.cpp")
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
"""torch's libraries whose symbols the device uses, in order."""
COMPILER = "g++"
BUILD_S = 300
"""Longest time of a build, in seconds."""


def unavailable() -> str | None:
    """Why the device cannot be used here, in one line with the remedy; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "the phantom GPU: torch is not installed"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "the phantom GPU needs torch's CPU build, this is one with CUDA; install it with make setup TORCH=cpu"
    if shutil.which(COMPILER) is None:
        return f"the phantom GPU needs {COMPILER}, which is not installed; install it"
    return None


def build() -> Path:
    """The device's library, compiled once for each version of torch and of the source, in the user's cache folder.
    RunError names why it cannot be built."""
    if reason := unavailable():
        raise RunError(reason)
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bifrost"
    library = folder / f"phantom-{key}.so"
    if library.is_file():
        return library
    own = library.with_suffix(f".{os.getpid()}")  # others may build it at the same time
    include = _torch() / "include"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-isystem", str(include), str(SOURCE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            [*command, "-o", str(own)],
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=BUILD_S,
        )
        if ended.returncode:
            line = next((line for line in ended.stderr.splitlines() if "error" in line), "no message")
            raise RunError(
                f"{SOURCE}: {COMPILER} failed ({line.strip()}); the phantom GPU needs another torch or {COMPILER}"
            )
        os.replace(own, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(
            f"{library}: the phantom GPU cannot be built ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from error
    finally:
        own.unlink(missing_ok=True)
    return library


def load() -> None:
    """Give this process the device. Must precede the first import of torch, which registers its devices once."""
    assert "torch" not in sys.modules, "torch was imported before the device was loaded"
    library = build()
    for name in LIBRARIES:
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    """torch's folder."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
