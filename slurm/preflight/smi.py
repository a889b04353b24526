"""Queries of nvidia-smi for the GPUs visible to this process; empty without nvidia-smi or for unsupported fields."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess

PATIENCE_S = 30


def query(field: str) -> list[str]:
    """One value per GPU; none without nvidia-smi or for an unsupported field. Raises RuntimeError for a failing GPU."""
    chosen = _chosen()
    text = _ask(
        f"--query-gpu={field}", "--format=csv,noheader,nounits", *([f"--id={','.join(chosen)}"] if chosen else [])
    )
    return [row[0].strip() for row in csv.reader(text.splitlines()) if row]


def nvlinks() -> list[list[float]]:
    """GB/s of each NVLink of every GPU, 0 for a link that is down; an empty list for a GPU without links, and no list
    if the output cannot be parsed."""
    try:
        text = _ask("nvlink", "--status")
    except RuntimeError:
        return []
    chosen, links = _chosen(), []
    current: list[float] | None = None
    for line in text.splitlines():
        if gpu := re.match(r"GPU (\d+):.*?(GPU-[\w-]+)?\)?$", line):
            current = [] if not chosen or gpu[1] in chosen or gpu[2] in chosen else None
            links += [current] if current is not None else []
        elif current is not None and (link := re.match(r"\s+Link \d+: (.*)", line)):
            speed = re.match(r"([\d.]+) GB/s", link[1])
            if not speed and "inactive" not in link[1].lower():
                return []  # for example a sleeping link, which is not a fault
            current.append(float(speed[1]) if speed else 0.0)
    return links


def uses_mig() -> bool:
    """Whether this process uses instances of partitioned GPUs (MIG)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")


def _chosen() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, empty for all. MIG instances, which nvidia-smi cannot query, are replaced by
    their GPUs, and abbreviated UUIDs by full ones."""
    wanted = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    if not wanted:
        return []
    if not all(each.isdigit() for each in wanted):
        wanted = [owner for each in wanted for owner in [_owner(each)] if owner]
    return list(dict.fromkeys(wanted))


def _owner(identity: str) -> str | None:
    if identity.isdigit():
        return identity
    gpu = None
    for line in _ask("-L").splitlines():
        found = re.search(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", line)
        if not found:
            continue
        gpu = found[1] if found[1].startswith("GPU-") else gpu
        # MIG-GPU-<identity>/<instance>/<instance> before driver 470.
        if found[1].startswith(identity) or (gpu and identity.startswith(f"MIG-{gpu}/")):
            return gpu
    return None


def _ask(*arguments: str) -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nvidia-smi does not answer within {PATIENCE_S} s") from None
    said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
    if done.returncode and not re.search(UNKNOWN, said[0]):
        raise RuntimeError(f"nvidia-smi: {said[0][:200]}")
    return "" if done.returncode else done.stdout


UNKNOWN = "not a valid field|[Ii]nvalid combination|Unable to retrieve NVLink|[Nn]ot [Ss]upported"
"""Messages for what this version of nvidia-smi or the GPU does not support."""
