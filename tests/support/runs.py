"""Small runs for tests: settings and results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL = (
    "precision=fp32",
    "global_batch=8",
    "micro_batch=2",
    "log_every=1",
    "data.workers=0",
    "data.shuffle_window=2",
    "tracking.enabled=false",
    "checkpoint.every=1000",
    "optimizer.schedule=constant",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=3",
)


TINY = ("backbone.path=builtin:tiny", "data.image_size=112")
"""The tiny recipes' own backbone, with several layers and 16 patches, for tests that need these."""


def arguments(shards: Path, runs_dir: Path, *overrides: str, recipe: str = "tiny-mllm") -> list[str]:
    """Arguments of the `bifrost` command for a small run of a tiny recipe, with a backbone of one layer: DeepSpeed's
    work per layer takes most of the time of so small a step."""
    import small_model  # not at the top: it imports transformers, which most tests do without

    model: list[str] = []
    if not any(override.startswith("backbone.path=") for override in overrides):
        backbone, image_size = small_model.settings(small_model.shared())
        model = [backbone, image_size] if recipe == "tiny-mllm" else [backbone]
    folders = [f"data.shards={shards}/train-*.tar", f"runs_dir={runs_dir}"]
    return ["train", recipe, *SMALL, *model, *folders, *overrides]


def steps(run: Path) -> list[dict]:
    """The metric lines of a run, without events."""
    return [line for line in lines(run) if "event" not in line]


def events(run: Path, kind: str) -> list[dict]:
    return [line for line in lines(run) if line.get("event") == kind]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps(run)]


@contextmanager
def launched(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Run `bifrost` in a separate process, which is killed with its ranks at the end of the block."""
    with subprocess.Popen([sys.executable, "-m", "bifrost.trainer", *arguments], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Child processes of all threads of a process."""
    try:
        return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended, as a process of an import does
        return []


def wait_for_steps(run: Path, count: int, timeout: float = 300) -> None:
    """Wait until the run has logged `count` steps."""
    deadline = time.monotonic() + timeout
    while not (run / "metrics.jsonl").exists() or len(steps(run)) < count:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.05)


def train_until_killed(arguments: list[str], step: int) -> None:
    """Train; every rank kills itself with SIGKILL in the optimizer step of `step`."""
    import ranked
    from bifrost.trainer.optim import engine

    done, advance = 0, engine.Engine.step

    def counted(self: Any, lr: float, skip: bool) -> bool:
        nonlocal done
        done += 1
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self, lr, skip)

    engine.Engine.step = counted
    ranked.succeed(arguments)


def replay(run: Path, *arguments: str) -> dict[str, Any]:
    """What `bifrost replay` finds."""
    import ranked

    (ended,) = ranked.bifrost(1, "replay", str(run), "--json", *arguments)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)
