"""Checks of the machine: processor and memory, GPUs, compilers, network."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import psutil

from ..versions import version
from .finding import Answer, Finding, ask
from .software import torch_cuda

GIB = 2**30
GPU_FIELDS = "name,memory.total,driver_version,compute_cap,mig.mode.current"
OLDEST_GPU = 8.0
"""Minimum compute capability: bf16 tensor cores, and compiled kernels."""


def processor() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Finding("processor", f"{cores} cores, {psutil.virtual_memory().total / GIB:,.0f} GiB of memory")]


def gpus() -> list[Finding]:
    """GPUs listed by the driver, and whether the installed torch can use them."""
    try:
        cuda, torch = torch_cuda(), True
    except OSError:
        cuda, torch = None, False
    answer = ask("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")
    if answer == "not found":
        return [
            Finding("GPUs", "no NVIDIA driver: training on the CPU", "warning", "enough for the demo and the tests")
        ]
    if isinstance(answer, str) or answer.code:
        message = answer if isinstance(answer, str) else (answer.text.splitlines() or ["no message"])[0][:120]
        remedy = "the driver does not work: see the output of nvidia-smi; a reboot may help"
        return [Finding("GPUs", f"nvidia-smi: {message}", "missing", remedy)]
    rows = [[cell.strip() for cell in row] for row in csv.reader(answer.text.splitlines()) if len(row) >= 5]
    if not rows:
        return [Finding("GPUs", "none: training on the CPU", "warning", "enough for the demo and the tests")]
    kinds = [f"{name}, {_gib(memory)}" for name, memory, *_ in rows]
    listed = "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    found = [Finding("GPUs", listed)]
    if torch and cuda is None:
        remedy = "torch is its CPU build: pip install --force-reinstall -c constraints.txt torch"
        found = [Finding("GPUs", listed, "missing", remedy)]
    elif old := [row[0] for row in rows if _number(row[3]) < OLDEST_GPU]:
        found = [
            Finding("GPUs", listed, "warning", f"{old[0]} has a compute capability below 8.0: no bf16 tensor cores")
        ]
    if any(row[4] == "Enabled" for row in rows):
        found.append(
            Finding("MIG", "enabled", "warning", "a process can use one slice only: disable MIG for several ranks")
        )
    return [*found, _driver(rows[0][2], cuda)]


def _driver(driver: str, cuda: str | None) -> Finding:
    """The driver, and whether it supports the major CUDA version of the installed torch."""
    header = ask("nvidia-smi")
    highest = re.search(r"CUDA Version: *([\d.]+)", header.text) if isinstance(header, Answer) else None
    if not highest or not cuda:
        return Finding("NVIDIA driver", driver)
    found = f"{driver}, supports CUDA up to {highest[1]}"
    if int(highest[1].split(".")[0]) < int(cuda.split(".")[0]):
        return Finding("NVIDIA driver", found, "missing", f"too old for torch's CUDA {cuda}: update the driver")
    return Finding("NVIDIA driver", found)


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"[\d.]+", text) else float("inf")


def _gib(mib: str) -> str:
    return f"{float(mib) / 1024:,.0f} GiB" if re.fullmatch(r"[\d.]+", mib) else mib


def compilers() -> list[Finding]:
    """Compilers that Triton, DeepSpeed and torch.compile use at run time."""
    rows = []
    for names, use in ((("g++", "c++"), "C++ compiler"), (("gcc", "cc", "clang"), "C compiler")):
        program = next((name for name in names if shutil.which(name)), None)
        remedy = "required by Triton, DeepSpeed's operators and torch.compile: apt-get install g++"
        rows.append(_compiler(use, program, remedy))
    if not (shutil.which("ninja") or version("ninja")):
        rows.append(Finding("ninja", "not found", "warning", "required by DeepSpeed's operators: pip install ninja"))
    nvcc = ask("nvcc", "--version") if shutil.which("nvcc") else "not found"
    release = re.search(r"release ([\d.]+)", nvcc.text) if isinstance(nvcc, Answer) else None
    rows.append(Finding("nvcc", release[1] if release else "not found: required only by zero.quantized_weights"))
    return rows


def _compiler(use: str, program: str | None, remedy: str) -> Finding:
    if program is None:
        return Finding(use, "not found", "warning", remedy)
    answer = ask(program, "--version")
    if isinstance(answer, str) or answer.code:
        return Finding(use, f"{program} does not run", "warning", remedy)
    return Finding(use, answer.text.splitlines()[0][:80] if answer.text else program)


def fabric(root: Path = Path("/")) -> list[Finding]:
    """InfiniBand and RoCE ports, active interfaces, NCCL. root: of the system's files."""
    rows, up, down = [], [], []
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        kind = {"Ethernet": "RoCE"}.get(_read(port / "link_layer"), _read(port / "link_layer") or "port")
        name = f"{port.parent.parent.name}:{port.name} {kind} {_read(port / 'rate')}".strip()
        (up if "ACTIVE" in _read(port / "state") else down).append(name)
    if up:
        rows.append(Finding("InfiniBand, RoCE", ", ".join(up)))
    if down:
        remedy = "inactive: check cable, switch and subnet manager; NCCL_IB_HCA can exclude ports"
        rows.append(Finding("InfiniBand, RoCE", ", ".join(down), "warning" if up else "missing", remedy))
    if not rows:
        rows.append(Finding("InfiniBand, RoCE", "none: nodes communicate over TCP"))
    interfaces = []
    for one in sorted((root / "sys/class/net").glob("*")):
        if one.name != "lo" and _read(one / "operstate") == "up":
            speed = _read(one / "speed")
            interfaces.append(one.name + (f" {int(speed) / 1000:g} Gb/s" if speed.isdigit() and int(speed) else ""))
    rows.append(Finding("interfaces", ", ".join(interfaces) or "none is up: single-node runs only"))
    nccl = version("nvidia-nccl-cu13") or version("nvidia-nccl-cu12")
    rows.append(Finding("NCCL", nccl or "none: gloo is used, on the CPU"))
    return rows


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
