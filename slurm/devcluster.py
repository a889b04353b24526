"""A real Slurm cluster on this machine, for tests: munged, slurmctld and one slurmd per node.

Each cluster has its own folder and ports, so that several do not interfere. Daemons and jobs run as the user who
starts the cluster.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from .errors import SlurmError
from .rank_env import PORTS, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CPUS = 8
"""Tasks per node, independent of the machine's cores."""
START_S = 30.0

CONFIG = """\
ClusterName=bifrost
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its first credential expires: a few seconds instead of the default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# All nodes are this machine; their names do not resolve.
TaskProlog={folder}/task_prolog.sh
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
# The rendezvous port is derived from the job id: different for each cluster on this machine.
FirstJobId={first_job}
ReturnToService=2
SlurmdTimeout=10
KillWait=10
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PROLOG = """\
#!/bin/sh
echo export MASTER_ADDR=127.0.0.1
echo export GLOO_SOCKET_IFNAME=lo
"""


def default_folder() -> Path:
    return Path.home() / ".cache" / "bifrost" / "devcluster"


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are missing on this machine."""
    return [name for name in PROGRAMS if not _find(name)]


def up(folder: Path, nodes: int) -> Path:
    """Start a cluster of `nodes` nodes, node1, node2, …, wait until they are idle and return its slurm.conf.

    Raises SlurmError if packages are missing, a cluster already runs in `folder`, or the cluster does not start.
    """
    if missing := missing_programs():
        raise SlurmError(f"{', '.join(missing)} not found: on Debian or Ubuntu, apt-get install slurm-wlm munge")
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and (_made_here(folder) or not any(folder.iterdir()))):
        raise SlurmError(f"--folder {folder}: holds something else; choose a new or empty folder")
    if len(str(folder)) > 80 or " " in str(folder):
        raise SlurmError(
            f"--folder {folder}: sockets are created there, choose a path of at most 80 letters without spaces"
        )
    if processes(folder):
        raise SlurmError(f"a cluster already runs in {folder}: bifrost slurm devcluster down --folder {folder}")
    try:
        _clear(folder)
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
    except OSError as error:
        raise SlurmError(f"--folder {folder}: {error.strerror}; choose a writable folder") from error
    names = [f"node{number + 1}" for number in range(nodes)]
    conf = _write_files(folder, names)
    # --force: munged would refuse a home that other users cannot read.
    _start("munged", "--force", *(f"--{name}={folder}/{file}" for name, file in MUNGE_FILES.items()))
    _start("slurmctld", "-f", str(conf), "-c")
    for name in names:
        start_node(folder, name)
    try:
        _wait_until_idle(conf, nodes)
    except SlurmError:
        down(folder)
        raise
    return conf


MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munged.seed",
}


LEFT = (
    "state",
    "spool.*",
    "node*.log",
    "node*.pid",
    "slurmctld.log",
    "slurmctld.pid",
    "munge.*",
    "munged.*",
    "slurm.conf",
    "task_prolog.sh",
)
"""What a cluster creates in its folder."""


def start_node(folder: Path, name: str) -> None:
    """Start the slurmd of one node, or restart one that was killed."""
    _start("slurmd", "-f", str(folder.resolve() / "slurm.conf"), "-N", name)


def processes(folder: Path, node: str | None = None) -> list[psutil.Process]:
    """Running daemons of the cluster in `folder` and their children, or only those of one node.

    A slurmstepd outlives its slurmd; it is recognised by the log file that both hold open.
    """
    daemons = ("slurmd", "slurmstepd") if node else ("slurmd", "slurmstepd", "slurmctld", "munged")
    logs = str(folder.resolve()) + (f"/{node}.log" if node else "/")
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.name() in daemons and any(file.path.startswith(logs) for file in process.open_files()):
                found.update((p.pid, p) for p in (process, *process.children(recursive=True)))
        except psutil.Error:
            continue
    return list(found.values())


def down(folder: Path) -> int:
    """Stop the cluster in `folder` and its jobs; return the number of processes ended. The folder's logs stay.

    Raises SlurmError for any other folder: it may hold the logs of the site's own Slurm.
    """
    if not _made_here(folder):
        raise SlurmError(f"--folder {folder}: holds no cluster that `devcluster up` made")
    return kill(processes(folder))


def kill(family: Iterable[psutil.Process]) -> int:
    """Send SIGKILL to all of `family` and wait for them to end."""
    family = list(family)
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
    return len(family)


def _made_here(folder: Path) -> bool:
    """Whether `up` made this folder."""
    try:
        return (folder / "slurm.conf").read_text(errors="replace").startswith(CONFIG.partition("\n")[0] + "\n")
    except OSError:
        return False


def _clear(folder: Path) -> None:
    """Remove only what an earlier cluster left in the folder."""
    for pattern in LEFT:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _write_files(folder: Path, names: list[str]) -> Path:
    key = folder / MUNGE_FILES["key-file"]
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    prolog = folder / "task_prolog.sh"
    prolog.write_text(PROLOG)
    prolog.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    port, *ports = _free_ports(len(names) + 1)
    lines = (
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={CPUS}"
        for name, node_port in zip(names, ports, strict=True)
    )
    conf = folder / "slurm.conf"
    settings = {"host": host, "port": port, "user": getpass.getuser(), "folder": folder, "nodes": "\n".join(lines)}
    conf.write_text(CONFIG.format(first_job=1 + secrets.randbelow(PORTS), **settings))
    return conf


def _free_ports(count: int) -> list[int]:
    """Different ports, none of them ephemeral: the daemons bind them later, and again after a restart."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _start(program: str, *arguments: str) -> None:
    """Start a daemon, which detaches itself."""
    path = _find(program)
    assert path
    # Jobs must not inherit the variables of a job that this may run in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    try:
        ended = subprocess.run(
            [path, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
            timeout=START_S,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program} does not start within {START_S:.0f} s") from None
    if ended.returncode:
        raise SlurmError(f"{program} does not start: {' '.join((ended.stderr or ended.stdout).split())}")


def _wait_until_idle(conf: Path, nodes: int) -> None:
    deadline = time.monotonic() + START_S
    shown = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            ended = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%N %T"],
                capture_output=True,
                text=True,
                env={**os.environ, "SLURM_CONF": str(conf)},
                check=False,
                timeout=left,
            )
        except subprocess.TimeoutExpired:
            break
        shown = ended.stdout or ended.stderr
        if [line.split()[-1] for line in ended.stdout.splitlines()] == ["idle"] * nodes:
            return
        time.sleep(0.2)
    raise SlurmError(
        f"the cluster is not ready after {START_S:.0f} s ({' '.join(shown.split())}); see {conf.parent}/*.log"
    )
