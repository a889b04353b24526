"""Run a function in a process that has the phantom GPU."""

from __future__ import annotations

import fcntl
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ENVIRONMENT = {"DS_ACCELERATOR": "cuda", "TORCH_FR_BUFFER_SIZE": "0"}


def run(function: Callable[..., Any], *arguments: Any, timeout: float = 1800) -> Any:
    """The result of `function(*arguments)` in a process of its own; both have to be JSON-serializable."""
    named = inspect.getfile(function), function.__name__, json.dumps(arguments)
    ended = subprocess.run(
        [sys.executable, __file__, *named],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def run_once(workers: pytest.TempPathFactory, function: Callable[..., Any], *arguments: Any) -> Any:
    """Like `run`, once for all of pytest's workers: those that ask meanwhile wait for the result."""
    base = workers.getbasetemp()
    kept = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"phantom-{function.__name__}.json"
    with open(kept.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(run(function, *arguments)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _main(file: str, name: str, arguments: str) -> None:
    """Call a function of a test file, which is not an importable module."""
    from bifrost.trainer.phantom.device import load

    load()
    spec = importlib.util.spec_from_file_location("phantom_test", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    print(json.dumps(getattr(module, name)(*json.loads(arguments))), flush=True)


if __name__ == "__main__":
    code = 1
    try:
        _main(*sys.argv[1:])
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
