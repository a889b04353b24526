"""Ranks of an srun step: one task a GPU, rank and size from Slurm's own variables."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Above the registered ports and below the ephemeral range that the kernel hands out.
FIRST_PORT, PORTS = 10_000, 20_000


def rank_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this srun task; None outside an srun step.

    The rendezvous is the step's first node; the port comes from the job id, so that two jobs on a node differ. Values
    already set by the user stay.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    derived = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(FIRST_PORT + int(environ.get("SLURM_JOB_ID", 0)) % PORTS),
    }
    return {name: environ.get(name, value) for name, value in derived.items()}


def private_folders(environ: Mapping[str, str]) -> dict[str, str]:
    """TMPDIR and TRITON_CACHE_DIR of this srun task alone, made if need be; below BIFROST_SCRATCH or TMPDIR.

    Ranks that compile the same kernels at the same moment must not write the same files. The name outlives a requeue,
    so that a start finds what an earlier one has compiled. Raises OSError.
    """
    base = environ.get("BIFROST_SCRATCH") or environ.get("TMPDIR") or tempfile.gettempdir()
    folder = Path(base) / _private_name(environ)
    folder.mkdir(parents=True, exist_ok=True)
    return {"TMPDIR": str(folder), "TRITON_CACHE_DIR": environ.get("TRITON_CACHE_DIR", f"{folder}/triton")}


def remove_private_folders(environ: Mapping[str, str]) -> None:
    """Remove what `private_folders` made for this task, whose run needs no other start."""
    folder = Path(environ.get("TMPDIR", ""))
    if folder.name == _private_name(environ):
        shutil.rmtree(folder, ignore_errors=True)


def _private_name(environ: Mapping[str, str]) -> str:
    # Short: sockets are made there.
    task = "-".join(environ.get(key, "0") for key in ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_LOCALID"))
    return f"bifrost-{task}"


def first_host(nodelist: str) -> str:
    """First host of Slurm's list notation: `gpu[007-012,020],login1` -> `gpu007`."""
    return expand_hosts(nodelist)[0]


def expand_hosts(nodelist: str) -> list[str]:
    """Every host of Slurm's list notation: `gpu[007-008,020],login1` -> gpu007, gpu008, gpu020, login1."""
    return [host for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist) for host in _expand(part)]


def _expand(part: str) -> list[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        return [head]
    ranges, _, tail = rest.partition("]")
    numbers = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return [head + number + end for number in numbers for end in _expand(tail)]
