"""A real Slurm cluster on this machine, for tests and for trying things: munged, slurmctld and one slurmd a node.

Everything lies in one folder and listens on ports of its own, so that several clusters do not meet. It runs as whoever
starts it, and its jobs run as that user.
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
from .rank_env import PORTS

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CPUS = 8
"""Tasks that a node takes, whatever the machine has."""
START_S = 30.0

CONFIG = """\
ClusterName=bifrost
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until its first credential has expired: a few seconds, where the default is two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Nodes share this machine, and no name server knows them.
TaskProlog={folder}/task_prolog.sh
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
# The port at which ranks meet follows from the job's id: that of another cluster on this machine is another.
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
    """Where the cluster lives unless the user says otherwise."""
    return Path.home() / ".cache" / "bifrost" / "devcluster"


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if not _find(name)]


def up(folder: Path, nodes: int) -> Path:
    """Start a cluster of `nodes` nodes, node1, node2, …, and wait until they are idle; returns its slurm.conf.

    SlurmError when packages are missing, when a cluster runs in `folder` already, or when one does not get going.
    """
    if missing := missing_programs():
        raise SlurmError(f"{', '.join(missing)} not found: on Debian or Ubuntu, apt-get install slurm-wlm munge")
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and (_made_here(folder) or not any(folder.iterdir()))):
        raise SlurmError(f"--folder {folder}: holds something else; name a new folder, or an empty one")
    if len(str(folder)) > 80 or " " in str(folder):
        raise SlurmError(f"--folder {folder}: sockets are made there, take a path of at most 80 letters, no spaces")
    if processes(folder):
        raise SlurmError(f"a cluster runs in {folder} already: bifrost slurm devcluster down --folder {folder}")
    try:
        _clear(folder)
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
    except OSError as error:
        raise SlurmError(f"--folder {folder}: {error.strerror}; name a folder that can be written") from error
    names = [f"node{number + 1}" for number in range(nodes)]
    conf = _write_files(folder, names)
    # Forced: a home that is closed to others is no fault here.
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
"""What a cluster makes in its folder."""


def start_node(folder: Path, name: str) -> None:
    """Start the slurmd of one node; also of one that was killed."""
    _start("slurmd", "-f", str(folder.resolve() / "slurm.conf"), "-N", name)


def processes(folder: Path, node: str | None = None) -> list[psutil.Process]:
    """Running daemons of the cluster in `folder` and what they have started, or those of one node alone.

    A slurmstepd outlives the slurmd that started it; it is known by the log file that both hold open.
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
    """End the cluster in `folder`, its jobs too; returns how many processes that took. The folder's logs stay.

    SlurmError for a folder of something else: a site's own Slurm may have its logs there.
    """
    if not _made_here(folder):
        raise SlurmError(f"--folder {folder}: holds no cluster that `devcluster up` made")
    return kill(processes(folder))


def kill(family: Iterable[psutil.Process]) -> int:
    """SIGKILL to all of `family`, and wait for them to go."""
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
    """Remove what an earlier cluster left in the folder, and nothing else."""
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
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _start(program: str, *arguments: str) -> None:
    """Run a daemon, which detaches itself."""
    path = _find(program)
    assert path
    # Jobs must not inherit what belongs to a job that this may run in.
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
