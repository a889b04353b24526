"""Time breakdown of a training step: torch.profiler over a few steps of a recipe, summed by kind of work.

On a GPU: time of kernels, and idle time between them. On a CPU: self time of operators, without operators they call.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .short_run import ShortRun

KINDS = {
    "head and loss": r"pointer_kernel|descriptor_kernel|inplace_kernel|bifrost::(patch_latent_loss)",
    "communication": r"nccl|gloo|c10d::|all_?gather|all_?reduce|reduce_?scatter|broadcast",
    "attention": r"flash|fmha|attention|softmax",
    "GEMM": r"gemm|gemv|cutlass|cublas|nvjet|xmma|aten::(mm|addmm|bmm|baddbmm|_?convolution|mkldnn)|onednn|mkl",
    "copies": r"[Mm]emcpy|[Mm]emset|aten::(copy_|fill_|zero_)",
    "idle": r"^(idle|bifrost\.data)$",
    # Phases of the loop and its hooks, without the operators inside: Python and DeepSpeed.
    "host": r"^bifrost\.|^torch::autograd|^autograd::|BackwardFunction",
}
"""Kind -> pattern for names of kernels or operators, tried in this order; the rest is element-wise."""


@dataclass(frozen=True)
class Work:
    """One kernel or operator: self time in microseconds and calls, over all profiled steps."""

    name: str
    kind: str
    microseconds: float
    calls: int


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "element-wise")


def profile_steps(run: ShortRun, out: Path) -> int:
    """Profile the steps of a short run on this rank.

    Rank 0 prints the table and writes `trace.json.gz` (for ui.perfetto.dev) and `profile.txt` to `out`. Returns the
    exit code.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    profiler = profile(activities=activities, acc_events=True)

    def stop() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()

    code = run.measure(profiler.start, stop)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(run.folder, ignore_errors=True)
        if code == 0:
            profiler.export_chrome_trace(str(out / "trace.json.gz"))
            text = table(works(profiler.events() or []), run.steps)
            (out / "profile.txt").write_text(text + "\n", encoding="utf-8")
            print(f"{text}\n\n{out / 'trace.json.gz'}: open it at https://ui.perfetto.dev")
    return code


def works(events: Iterable[Any]) -> list[Work]:
    """Work on the GPU, or without one on the CPU threads, longest first; includes idle time of the device."""
    found = list(events)
    kernels = [event for event in found if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    own: dict[str, list[float]] = defaultdict(list)
    if kernels:
        spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
        for event in kernels:
            own[event.name].append(event.time_range.end - event.time_range.start)
        own["idle"] = [_gaps(spans)]
    else:
        for event in found:
            own[event.name].append(event.self_cpu_time_total)
    rows = [Work(name, kind_of(name), sum(times), len(times)) for name, times in own.items()]
    return sorted(rows, key=lambda row: -row.microseconds)


def _gaps(spans: list[tuple[float, float]]) -> float:
    """Microseconds between the first start and the last end in which no span runs; spans sorted by start."""
    idle, until = 0.0, spans[0][0]
    for begin, end in spans:
        idle += max(0.0, begin - until)
        until = max(until, end)
    return idle


def table(rows: list[Work], steps: int, top: int = 15) -> str:
    """Shares by kind, then the longest kernels or operators."""
    total = sum(row.microseconds for row in rows) or 1.0
    kinds: dict[str, float] = defaultdict(float)
    for row in rows:
        kinds[row.kind] += row.microseconds
    lines = [f"{'kind':<16} {'ms per step':>11} {'share':>7}"]
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:<16} {spent / steps / 1000:>11.2f} {spent / total:>7.1%}")
    lines += ["", f"{'the longest':<64} {'kind':<14} {'calls per step':>14} {'ms per step':>11}"]
    for row in rows[:top]:
        spent = row.microseconds / steps / 1000
        lines.append(f"{row.name[:64]:<64} {row.kind:<14} {row.calls / steps:>14.1f} {spent:>11.2f}")
    return "\n".join(lines)
