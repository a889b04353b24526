"""A Slurm job on two nodes with two ranks each: started, ended and requeued as by the batch script, without Slurm.

The steps of the batch script before and after the ranks are the real ones; this module replaces srun, which starts the
ranks and ends them all after one has failed, and scontrol, which accepts every requeue.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import runs
import two_nodes
from bifrost.data.processes import die_with_parent
from bifrost.recipes import load_recipe
from bifrost.slurm.job import RECIPE, Job, write_recipe
from bifrost.slurm.rank_env import LAUNCHER_VARIABLES
from two_nodes import TwoNodes

PER_NODE = 2
RANKS = PER_NODE * len(two_nodes.NAMES)
ID = "7"
TERM_S = 10.0
"""Seconds from srun's SIGTERM to its SIGKILL; Slurm's KillWait is 30."""
SCONTROL = "#!/bin/sh\ncase $* in *show*) echo 'JobId=7 JobState=RUNNING Reason=None ExcNodeList=(null)';; esac\n"


@dataclass
class Attempt:
    """One start of the job's ranks. Times are those of `time.monotonic()`."""

    number: int
    earlier: int
    """Number of `start` events of earlier attempts."""
    ranks: list[subprocess.Popen] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    """Ranks on nodes that vanished: srun does not see them end."""
    ended: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rank -> exit code and when it was seen. Ranks that srun ended are not listed."""
    code: int | None = None
    """What srun exits with; None before `SlurmJob.wait`."""
    decision: str = ""
    """The line of the batch script's last step."""


class SlurmJob:
    """The job of a run with the `bifrost train` arguments `arguments`, a recipe and overrides; all ranks are killed at
    the end of a `with` block."""

    def __init__(self, nodes: TwoNodes, folder: Path, arguments: list[str]) -> None:
        self.nodes, self.folder = nodes, folder
        recipe = load_recipe(arguments[0], arguments[1:])
        self.run = Path(recipe.runs_dir) / recipe.name
        self.attempts: list[Attempt] = []
        (self.run / "slurm").mkdir(parents=True)
        job = Job(
            name=recipe.name,
            run=str(self.run),
            folder=str(folder),
            nodes=(2, 2),
            gpus_per_node=0,
            tasks_per_node=PER_NODE,
            grace_s=120,
            id=ID,
        )
        job.save()
        write_recipe(self.run, recipe.to_yaml())
        (folder / "bin").mkdir()
        (folder / "bin" / "scontrol").write_text(SCONTROL)
        (folder / "bin" / "scontrol").chmod(0o755)

    def __enter__(self) -> SlurmJob:
        return self

    def __exit__(self, *_: object) -> None:
        for attempt in self.attempts:
            _kill(attempt.ranks)

    def start(self) -> Attempt:
        """Start an attempt, the first or the next one."""
        number = len(self.attempts)
        environment = self._environment(number)
        _, port, *_ = self._step(number, "before").stdout.split()
        attempt = Attempt(number, len(self._starts()))
        self.attempts.append(attempt)
        for rank in range(RANKS):
            node = rank // PER_NODE
            variables = {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % PER_NODE),
                "SLURM_NTASKS": str(RANKS),
                "SLURM_STEP_NODELIST": "node[1-2]",
                "SLURMD_NODENAME": two_nodes.NAMES[node],
                "MASTER_ADDR": two_nodes.ADDRESSES[0],
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": two_nodes.INTERFACE,
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder),
            }
            with open(self.log, "a") as log:
                command = [sys.executable, "-m", "bifrost.trainer", "train", str(self.run / RECIPE)]
                process = subprocess.Popen(
                    [*self.nodes.inside(node), *command],
                    env=environment | variables,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=partial(die_with_parent, os.getpid()),
                )
            attempt.ranks.append(process)
        return attempt

    def lose(self, node: int) -> None:
        """Kill the ranks of node 0 or 1, unseen by srun. Cut the link first: the kernel closes their connections."""
        attempt = self.attempts[-1]
        attempt.lost = set(range(node * PER_NODE, (node + 1) * PER_NODE))
        _kill([attempt.ranks[rank] for rank in attempt.lost])

    def wait(self, timeout: float) -> Attempt:
        """Wait until srun would return, and let the batch script's last step decide what follows."""
        attempt, deadline = self.attempts[-1], time.monotonic() + timeout
        watched = [rank for rank in range(RANKS) if rank not in attempt.lost]
        terminate_at = None
        while len(attempt.ended) < len(watched):
            now = time.monotonic()
            assert now < deadline, f"ranks {set(watched) - attempt.ended.keys()} have not ended\n{self.log.read_text()}"
            for rank in watched:
                if rank not in attempt.ended and (code := attempt.ranks[rank].poll()) is not None:
                    attempt.ended[rank] = (code, now)
                    terminate_at = terminate_at or (now + TERM_S if code else None)
            if terminate_at and now > terminate_at:
                break
            time.sleep(0.02)
        _kill(attempt.ranks)
        codes = [128 - code if code < 0 else code for code, _ in attempt.ended.values()]
        attempt.code = max(codes)
        last = self._step(attempt.number, "after", "--code", str(attempt.code)).stderr
        attempt.decision = last.strip().removeprefix("bifrost: ").replace(f"{self.run.parent}/", "")
        return attempt

    def wait_for_step(self, step: int, timeout: float = 240) -> float:
        """Wait until the newest attempt has logged `step` or a later one; returns the time at which that was seen."""
        self._wait(f"step {step}", lambda: any(line["step"] >= step for line in self.new_steps()), timeout)
        return time.monotonic()

    def new_steps(self) -> list[dict]:
        """The step lines of the newest attempt; empty until it is ready to step."""
        starts = self._starts()
        if len(starts) == self.attempts[-1].earlier:
            return []
        return [line for line in runs.lines(self.run)[starts[-1] :] if "event" not in line]

    def _starts(self) -> list[int]:
        """Where the `start` events are among the lines of metrics.jsonl."""
        if not (self.run / "metrics.jsonl").exists():
            return []
        return [index for index, line in enumerate(runs.lines(self.run)) if line.get("event") == "start"]

    @property
    def log(self) -> Path:
        """Output of all ranks."""
        return self.run / "slurm" / "job.log"

    def errors(self) -> list[str]:
        """The error lines of the log, without paths of this machine."""
        lines = self.log.read_text().replace(f"{self.run.parent}/", "").splitlines()
        return [line for line in lines if line.startswith("error: ")]

    def _wait(self, what: str, true: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            alive = any(process.poll() is None for process in self.attempts[-1].ranks)
            assert alive and time.monotonic() < deadline, f"no {what}\n{self.log.read_text()}"
            time.sleep(0.05)

    def _environment(self, number: int) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        return kept | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": ID,
            "SLURM_RESTART_COUNT": str(number),
            "SLURM_JOB_NUM_NODES": str(len(two_nodes.NAMES)),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "BIFROST_RUN": str(self.run),
            "BIFROST_SITE": os.devnull,
            "PYTHONSAFEPATH": "1",
        }

    def _step(self, number: int, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A step of the batch script of attempt `number`, `before` or `after` the ranks."""
        command = [sys.executable, "-m", "bifrost.slurm", verb, str(self.run), *arguments]
        return subprocess.run(command, env=self._environment(number), capture_output=True, text=True, check=True)


def _kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
