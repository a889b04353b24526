"""Run a function, or the `bifrost` command, on several real ranks: processes connected by gloo."""

from __future__ import annotations

import importlib.util
import inspect
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["preload"])


@dataclass
class Rank:
    """Outcome of one rank: exit code, output, and the result of its function."""

    code: int | None
    out: str
    err: str
    value: Any


def start(function: Callable, ranks: int, *args: Any, folder: Path) -> list[mp.process.BaseProcess]:
    """Start `function(*args)` on every rank; output and result are written to files in `folder`."""
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "BIFROST_RENDEZVOUS": str(folder / "rendezvous"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        named = (inspect.getfile(function), function.__name__)
        process = _context.Process(target=_child, args=(named, args, environment, str(folder)))
        process.start()
        processes.append(process)
    return processes


def finish(processes: Sequence[mp.process.BaseProcess], folder: Path, timeout: float = 240) -> list[Rank]:
    """Wait for all ranks, kill those still running after `timeout` seconds, and collect the outcomes."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    outcomes = []
    for rank, process in enumerate(processes):
        out, err, value = (_read(folder / f"{rank}.{kind}") for kind in ("out", "err", "value"))
        outcomes.append(Rank(process.exitcode, out, err, json.loads(value) if value else None))
    assert not late, f"ranks {late} hang\n" + "\n".join(o.err[-3000:] for o in outcomes)
    return outcomes


def run(function: Callable, ranks: int, *args: Any, timeout: float = 240) -> list[Rank]:
    """Run `function(*args)` on `ranks` ranks; its result, which has to be JSON-serializable, is each rank's value."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return finish(start(function, ranks, *args, folder=folder), folder, timeout)


def bifrost(ranks: int, *arguments: str, timeout: float = 240) -> list[Rank]:
    """Run the `bifrost` command on `ranks` ranks."""
    return run(command, ranks, list(arguments), timeout=timeout)


def command(arguments: list[str]) -> None:
    """Run the `bifrost` command in this process."""
    from bifrost.trainer.cli import main

    sys.argv = ["bifrost", *arguments]
    main.main()


def succeed(arguments: list[str]) -> None:
    """Run the `bifrost` command in this process and return after its success."""
    try:
        command(arguments)
    except SystemExit as ended:
        assert not ended.code


def _child(named: tuple[str, str], args: tuple, environment: dict[str, str], folder: str) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        value = _load(*named)(*args)
        Path(f"{folder}/{rank}.value").write_text(json.dumps(value))
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _load(file: str, name: str) -> Callable:
    """Load a function of a test file, since test files are not importable modules."""
    spec = importlib.util.spec_from_file_location("ranked_test", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return getattr(module, name)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
