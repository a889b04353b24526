"""The record of a benchmark, and its machine without anything that identifies it."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from ...slurm.io import write_json
from ..errors import writing
from ..versions import versions


def machine(*packages: str) -> dict[str, Any]:
    """CPU model, cores available to this process, GPUs, and versions of Python and `packages`."""
    import torch

    return {
        "cpu": _processor(),
        "cores": len(usable_cores()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": {
            "python": platform.python_version(),
            **versions(("torch", *packages)),
        },
    }


def device_kind() -> str:
    """What computes here: `cuda`; `phantom`, a CUDA device that a build of torch for CPUs pretends to have; `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if torch.version.cuda or torch.version.hip else "phantom"


def write_record(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write a benchmark's record as JSON; RunError if `folder` cannot be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, record)


def usable_cores() -> list[int]:
    """Ids of the cores available to this process."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def format_machine(found: dict[str, Any]) -> str:
    """The record as one line."""
    devices = [f"{found['cpu']}, {found['cores']} cores", *found["gpus"]]
    return "; ".join([*devices, ", ".join(f"{name} {version}" for name, version in found["versions"].items())])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
