"""A run on the local Slurm cluster, controlled by the `bifrost slurm` commands as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml
from typer.testing import CliRunner

import runs
from bifrost.slurm import devcluster
from bifrost.slurm.cli import slurm_app

Stand = Callable[..., Callable[[], list[str]]]
"""Type of the fixture `stand`."""

STAND_IN = r"""#!/bin/bash
# Replaces Python: runs one line of the script per attempt, as the ranks of that attempt.
fail() { # CODE REASON: like a rank that exits with an error
  format='{"attempt": "%s.%s", "rank": "%s", "code": %d, "reason": "%s"}'
  (set -C; printf "$format" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$SLURM_PROCID" "$1" "$2" \
    > "$BIFROST_RUN/slurm/exit_record.json") 2> /dev/null
  exit "$1"
}
start=$(grep -c '"hosts"' "$BIFROST_RUN/slurm/attempts.jsonl")
eval "$(sed -n "${start}p" "$BIFROST_RUN/../script")"
"""


class ClusterRun:
    """The run `tiny-mllm` in a separate folder."""

    def __init__(self, cluster: Path, shards: Path, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "tiny-mllm"
        # Steps long enough for a signal or a dead node to meet a run in the middle.
        self.settings = runs.arguments(shards, folder, *runs.TINY)[2:]
        self.jobs: list[str] = []

    def site(self, **settings: object) -> None:
        """Write the site file; preflight is disabled unless set in `settings`."""
        Path(os.environ["BIFROST_SITE"]).write_text(yaml.safe_dump({"preflight": False, **settings}))

    def stand_in(self, *starts: str, **site: object) -> None:
        """Replace the ranks' Python by one shell line per attempt."""
        (self.folder / "script").write_text("\n".join(starts) + "\n")
        program = self.folder / "python"
        program.write_text(STAND_IN)
        program.chmod(0o755)
        self.site(python=str(program), **site)

    def bifrost(self, *arguments: str) -> str:
        """Run a `bifrost slurm` command and return its output."""
        ended = CliRunner().invoke(slurm_app, arguments, catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        return ended.stdout

    def submit(self, *arguments: str, nodes: str = "2") -> str:
        """Submit with two CPU ranks per node and return the job id."""
        common = ["tiny-mllm", *self.settings, "--gpus-per-node", "0", "--tasks-per-node", "2", "--nodes", nodes]
        self.jobs.append(self.bifrost("submit", *common, *arguments).strip())
        return self.jobs[-1]

    def wait(self, what: str, condition: Callable[[], object], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {timeout:.0f} s\n{self.log()}\n{slurm('squeue')}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: self.steps() and self.steps()[-1]["step"] >= step)

    def wait_for_end(self) -> None:
        """Wait until the run's last decision is final and its job is gone."""
        self.wait(
            "end", lambda: self.attempts() and self.attempts()[-1].get("decision") in ("done", "stopped", "cancelled")
        )
        self.wait("quiet", self.quiet)

    def quiet(self) -> bool:
        """Whether all nodes are idle."""
        return set(slurm("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}

    def steps(self) -> list[dict]:
        return runs.steps(self.run) if (self.run / "metrics.jsonl").exists() else []

    def attempts(self) -> list[dict]:
        """The run's attempts, with their decisions."""
        from bifrost.slurm.exit_record import attempts

        return attempts(self.run)

    def log(self) -> str:
        path = self.run / "slurm" / "job.log"
        return path.read_text() if path.exists() else ""

    def stopped(self) -> dict:
        return json.loads((self.run / "stopped.json").read_text())

    def ranks_on(self, node: str) -> list[psutil.Process]:
        """Processes of the ranks on a node."""
        return [p for p in devcluster.processes(self.cluster, node) if "bifrost.trainer" in p.cmdline()]

    def clear(self) -> None:
        """End all jobs of the run."""
        slurm("scancel", "--name=tiny-mllm")
        slurm("scancel", "--name=tiny-mllm", "--signal=KILL", "--full")
        for node in slurm("sinfo", "-h", "-N", "-t", "down", "-o", "%N").split():
            devcluster.start_node(self.cluster, node)
        self.wait("quiet", self.quiet)


def slurm(*command: str) -> str:
    """The output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def job(number: str) -> dict[str, str]:
    """Slurm's record of a job."""
    shown = slurm("scontrol", "-o", "show", "job", number)
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def failing(words: str) -> str:
    """A shell line that fails like a Slurm command with the error `words`."""
    return f"echo '{words}' >&2; exit 1"
