"""Rank of this process, from the environment set by srun, torchrun, our own launcher or the user."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from .errors import SlurmError

# Below the kernel's ephemeral port range.
FIRST_PORT, PORTS = 10_000, 20_000
STEP_STRIDE = 997
"""Distance between the ports of consecutive steps of a job."""
INTERACTIVE_STEP = str(2**32 - 6)
"""Id of the step in which salloc runs its shell, on sites that run it on a compute node."""

UNBIND = "each task must see all GPUs of its node; leave out --gpus-per-task, --tres-per-task and --gpu-bind"

Launcher = Literal["bifrost", "torchrun", "slurm", "environment"]

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "BIFROST_LAUNCHER",
    "BIFROST_RENDEZVOUS",
)
"""Variables that launchers set for their ranks; meaningless in any other process."""


def host_name(environ: Mapping[str, str] = os.environ) -> str:
    """Name of this machine, in all files of a run. Nodes of a cluster on one machine have names of their own."""
    return environ.get("SLURMD_NODENAME") or platform.node()


def launched_by(environ: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process as a rank; None if it is not a rank.

    Slurm's task count is compared with WORLD_SIZE only in a step of several tasks: a single task may itself start ranks
    (torchrun, `bifrost train --ranks`). Raises SlurmError for contradictory variables.
    """
    if "BIFROST_LAUNCHER" in environ:
        return "bifrost"
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    tasks, given = step_tasks(environ), [name for name in ("RANK", "WORLD_SIZE") if environ.get(name)]
    if tasks > 1:
        task = int(environ["SLURM_PROCID"])
        if "SLURM_PTY_PORT" in environ and not _started_by_slurm():
            raise SlurmError(
                f"this shell is task {task} of {tasks} of an interactive step: start all tasks with srun, or give"
                " --ranks to start ranks on this node alone"
            )
        if len(given) < 2:
            return "slurm"
        rank, size = _rank_and_size(environ)
        if size == tasks:
            return "slurm"
        if size % tasks or rank // (size // tasks) != task:
            raise SlurmError(
                f"RANK={rank} and WORLD_SIZE={size} are set, but Slurm runs this as task {task} of {tasks}: they are"
                f" left over from another launcher; unset {_names(environ)}"
            )
        return "environment"  # set by a launcher that runs in every task
    if len(given) == 1:
        raise SlurmError(
            f"{given[0]} is set without {'RANK' if given[0] == 'WORLD_SIZE' else 'WORLD_SIZE'}: unset"
            f" {_names(environ)}, which may be left over from another launcher, or set all variables of a rank"
        )
    if given:
        return "environment"
    # A submitted job fixes the number of ranks; elsewhere a single task may start one rank per GPU.
    return "slurm" if tasks and "BIFROST_RUN" in environ else None


def rank_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Validated RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process; None if it is not a rank.

    In an srun task, the first three come from Slurm, whatever else is set. MASTER_ADDR defaults to the step's first
    node, MASTER_PORT to one derived from job and step ids, so that steps that share a node use different ports.
    Raises SlurmError for missing, non-numeric or contradictory variables.
    """
    launcher = launched_by(environ)
    if launcher is None:
        return None
    if launcher == "slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        number = int(environ.get("SLURM_JOB_ID", 0)) + STEP_STRIDE * int(environ["SLURM_STEP_ID"])
        environ = {
            **environ,
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": str(step_tasks(environ)),
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "MASTER_ADDR": environ.get("MASTER_ADDR") or expand_hosts(nodes)[0],
            "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + number % PORTS),
        }
    rank, size = _rank_and_size(environ)
    wanted = ["LOCAL_RANK"] if size > 1 else []
    if size > 1 and "BIFROST_RENDEZVOUS" not in environ:
        wanted += ["MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in wanted if not environ.get(name)]:
        raise SlurmError(
            f"RANK={rank} and WORLD_SIZE={size} are set without {', '.join(missing)}: unset {_names(environ)}, which"
            " may be left over from another launcher, or set all variables of a rank"
        )
    local = _number(environ, "LOCAL_RANK") if environ.get("LOCAL_RANK") else 0
    if not 0 <= local < size:
        raise SlurmError(f"LOCAL_RANK={local} with WORLD_SIZE={size}: want 0 to {size - 1}")
    found = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local)}
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        if not 0 < _number(environ, "MASTER_PORT") < 2**16:
            raise SlurmError(f"MASTER_PORT={environ['MASTER_PORT']}: want a port, 1 to 65535")
        found |= {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    return found


def free_port(seed: int | None = None) -> int:
    """A free port on this host, for a process that binds it later; the search starts at a port derived from `seed`, or
    at any. Ephemeral ports are excluded: another connection could take one before it is used."""
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    for attempt in range(PORTS):
        port = FIRST_PORT + (seed + STEP_STRIDE * attempt) % PORTS
        with socket.socket() as probe:
            # Bind like the store does: ports in TIME_WAIT from an earlier rendezvous are usable.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise SlurmError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free on this host")


def step_tasks(environ: Mapping[str, str]) -> int:
    """Number of tasks of this process's srun step; 0 outside a step, as in a batch script."""
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return 0
    return int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])


def idle_nodes(environ: Mapping[str, str]) -> int:
    """Nodes of the job that stay idle if a command starts here without srun, from a batch script or salloc's shell."""
    shell = step_tasks(environ) == 0 or environ.get("SLURM_STEP_ID") == INTERACTIVE_STEP
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    return int(nodes) - 1 if shell else 0


def _rank_and_size(environ: Mapping[str, str]) -> tuple[int, int]:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise SlurmError(f"RANK={rank} with WORLD_SIZE={size}: want a rank of 0 to WORLD_SIZE - 1; {_remedy(environ)}")
    return rank, size


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise SlurmError(f"{name} is not set; {_remedy(environ)}") from None
    except ValueError:
        raise SlurmError(f"{name}={environ[name]}: want a number; {_remedy(environ)}") from None


def _remedy(environ: Mapping[str, str]) -> str:
    return f"unset {_names(environ)} unless a launcher sets them"


def _names(environ: Mapping[str, str]) -> str:
    """The variables to unset, as arguments of `unset`."""
    return " ".join(name for name in LAUNCHER_VARIABLES if name in environ)


def _started_by_slurm() -> bool:
    """Whether Slurm started this process directly; a command typed into a task's shell has that shell as parent."""
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().startswith("slurmstepd")
    except OSError:
        return True


def private_folders(environ: Mapping[str, str]) -> dict[str, str]:
    """Private TMPDIR and TRITON_CACHE_DIR of this srun task, created if missing, below BIFROST_SCRATCH or TMPDIR.

    Ranks that compile the same kernels at the same time must not write the same files. The name stays the same across
    requeues, so that compiled kernels are reused. Raises SlurmError if the folder cannot be created or is not safe.
    """
    base = environ.get("BIFROST_SCRATCH") or environ.get("TMPDIR") or tempfile.gettempdir()
    folder = Path(base) / _private_name(environ)
    make_private(folder)
    found = {"TMPDIR": str(folder), "TRITON_CACHE_DIR": environ.get("TRITON_CACHE_DIR", "")}
    if not found["TRITON_CACHE_DIR"]:
        make_private(folder / "triton")
        found["TRITON_CACHE_DIR"] = str(folder / "triton")
    return found


def make_private(folder: Path) -> None:
    """Create `folder` with access for this user only, or check an existing one: compiled code is loaded from it.

    Raises SlurmError for a symbolic link or file, a folder of another user, or one that others can write to: in /tmp,
    any user could create it under a predictable name.
    """
    remedy = f"remove it, or set BIFROST_SCRATCH to a folder of your own instead of {folder.parent}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()
    except OSError as error:
        raise SlurmError(f"{folder}: {error.strerror}; set BIFROST_SCRATCH to a writable folder") from error
    if not stat.S_ISDIR(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a folder"
        raise SlurmError(f"{folder} is {what}, and code is loaded from it: {remedy}")
    if found.st_uid != os.getuid():
        raise SlurmError(f"{folder} belongs to user {found.st_uid}, and code is loaded from it: {remedy}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.filemode(found.st_mode)
        raise SlurmError(f"{folder} can be written by others ({mode}), and code is loaded from it: {remedy}")


def remove_private_folders(environ: Mapping[str, str]) -> None:
    """Remove the folders that `private_folders` created for this task, once its run is complete."""
    folder = Path(environ.get("TMPDIR", ""))
    if folder.name == _private_name(environ) and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def _private_name(environ: Mapping[str, str]) -> str:
    # Short, since sockets are created there.
    task = "-".join(environ.get(key, "0") for key in ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_LOCALID"))
    return f"bifrost-{task}"


def expand_hosts(nodelist: str) -> list[str]:
    """Every host of Slurm's list notation: `gpu[007-008,020],login1` -> gpu007, gpu008, gpu020, login1.

    Not python-hostlist: that is GPL, and this package is Apache-2.0.
    """
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
