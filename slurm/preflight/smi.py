"""What nvidia-smi says of the GPUs that this process may use; nothing where it is missing or does not know."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess

PATIENCE_S = 30


def query(field: str) -> list[str]:
    """One value per GPU; none where there is no nvidia-smi or it does not know the field. RuntimeError on a sick
    GPU."""
    chosen = _chosen()
    text = _ask(
        f"--query-gpu={field}", "--format=csv,noheader,nounits", *([f"--id={','.join(chosen)}"] if chosen else [])
    )
    return [row[0].strip() for row in csv.reader(text.splitlines()) if row]


def nvlinks() -> list[list[float]]:
    """GB/s of each NVLink of every GPU, 0 for one that is down; an empty list for a GPU that has none, and no list
    where the answer cannot be read."""
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
                return []  # asleep, say, which is no fault
            current.append(float(speed[1]) if speed else 0.0)
    return links


def uses_mig() -> bool:
    """Whether this process was given instances of partitioned GPUs (MIG)."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")


def _chosen() -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES, none for all: of MIG instances, which nvidia-smi does not query, the GPUs that
    they are parts of; of the first letters of an identity the whole."""
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
"""What this version of the tool or the GPU has not got."""
