"""GPUs of a node before anything runs on them: number, memory, ECC, clocks. What is not readable is no fault."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess

from ..ranks import UNBIND
from .finding import Finding

FIELDS = {
    "memory": "memory.used",
    "ecc": "ecc.errors.uncorrected.volatile.total",
    "clock": "clocks.sm",
    "fastest": "clocks.max.sm",
    "throttle": "clocks_throttle_reasons.active",
}
SLOWED = {0x8: "hardware slowdown", 0x20: "heat (driver)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Reasons to run slowly that are a fault; being idle or at the power cap is none."""
PATIENCE_S = 30
UNREADABLE = "not readable"


def device_findings(asked: int | None, idle_gib: float, bound: bool = False) -> list[Finding]:
    """Findings on the GPUs that this process may use; `asked` is how many the job asked for, None when not known.

    `bound`: the job binds GPUs to tasks, so that fewer of them are no fault of the machine.
    """
    import torch

    seen = torch.cuda.device_count()
    if bound and asked is not None and seen < asked:
        return [Finding("GPUs", str(seen), f"a task sees {seen} of its node's {asked} GPUs: {UNBIND}")]
    if asked is not None and seen != asked:
        return [Finding("GPUs", str(seen), f"{seen} GPUs usable, {asked} asked for", own=True)]
    findings = [Finding("GPUs", str(seen))]
    if not seen:
        return findings
    try:
        columns = {name: _query(field) for name, field in FIELDS.items()}
    except RuntimeError as error:
        return [*findings, Finding("GPU health", "", str(error), own=True)]
    return [
        *findings,
        _memory(columns["memory"], idle_gib),
        _errors(columns["ecc"]),
        _clocks(columns["clock"], columns["fastest"], columns["throttle"]),
    ]


def _memory(used: list[str], idle_gib: float) -> Finding:
    mib = [float(value) for value in used if _number(value)]
    if not mib:
        return Finding("GPU memory", UNREADABLE)
    most = max(mib) / 1024
    reason = f"GPU {mib.index(max(mib))} has {most:.1f} GiB in use before the job" if most > idle_gib else ""
    return Finding("GPU memory", f"{most:.1f} GiB in use", reason, own=True)


def _errors(counts: list[str]) -> Finding:
    errors = [int(value) for value in counts if value.isdigit()]
    if not errors:
        return Finding("GPU ECC", UNREADABLE)
    worst = max(errors)
    reason = f"GPU {errors.index(worst)} has {worst} uncorrected ECC errors since its last reset" if worst else ""
    return Finding("GPU ECC", f"{sum(errors)} uncorrected", reason, own=True)


def _clocks(now: list[str], fastest: list[str], throttle: list[str]) -> Finding:
    for device, value in enumerate(throttle):
        active = int(value, 16) if value.startswith("0x") else 0
        reasons = [name for bit, name in SLOWED.items() if active & bit]
        if reasons:
            return Finding("GPU clocks", value, f"GPU {device} is slowed by {', '.join(reasons)}", own=True)
    mhz = [f"{a}/{b}" for a, b in zip(now, fastest, strict=False) if _number(a) and _number(b)]
    return Finding("GPU clocks", f"{', '.join(dict.fromkeys(mhz))} MHz" if mhz else UNREADABLE)


def _query(field: str) -> list[str]:
    """One value a GPU; none where there is no nvidia-smi or it does not know the field. RuntimeError on a sick GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nvidia-smi does not answer within {PATIENCE_S} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        if "not a valid field" in said[0]:
            return []
        raise RuntimeError(f"nvidia-smi: {said[0][:200]}")
    return [row[0].strip() for row in csv.reader(done.stdout.splitlines()) if row]


def _number(value: str) -> bool:
    return value.replace(".", "", 1).isdigit()
