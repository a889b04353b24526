"""Whether Slurm is installed and its controller answers."""

from __future__ import annotations

import shutil
import subprocess

NEEDED = ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel", "sinfo")
"""Commands that submitted runs use."""


def slurm_here(limit_s: float = 5.0) -> tuple[str, str]:
    """(what was found, what is wrong with it); the latter is empty if Slurm works or is not installed.

    limit_s: timeout of each command in seconds.
    """
    there = [name for name in NEEDED if shutil.which(name)]
    if not there:
        return "not installed: start runs by hand", ""
    if lacking := [name for name in NEEDED if name not in there]:
        return f"{len(there)} of its commands", f"{', '.join(lacking)} not on the PATH: load Slurm's module"
    code, version = _ask(["sinfo", "--version"], limit_s)
    found = version if code == 0 and version else "its commands"
    code, answer = _ask(["scontrol", "ping"], limit_s)
    controllers = [line for line in answer.splitlines() if "slurmctld" in line.lower()]
    if code is None:
        return found, f"scontrol ping: {answer}; ask the cluster's operators"
    if not any(" UP" in line for line in controllers):
        said = (controllers or answer.splitlines() or ["no message"])[0][:120]
        return found, f"its controller does not answer ({said}): on a login node? is SLURM_CONF right?"
    return f"{found}, the controller answers", ""


def _ask(command: list[str], limit_s: float) -> tuple[int | None, str]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: a process stuck in the kernel ignores even SIGKILL
        return None, f"no answer within {limit_s:g} s"
    return process.returncode, text.strip()
