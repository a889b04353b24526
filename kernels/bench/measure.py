"""Measurements of the benchmark: time, error, memory, and the state of the machine."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import triton
from .cases import Candidate, Floor, Mode, copy_floor, gemm_floor

QUANTILES = (0.5, 0.2, 0.8)
SLACK = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
"""Relative error allowed for every provider: the rounding of the stored result."""


class Timing(NamedTuple):
    """Milliseconds: median, 20 % and 80 % quantile."""

    median: float
    low: float
    high: float


def steps(candidate: Candidate, mode: Mode) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """(prepare, run): the untimed part, and the timed part, which takes prepare's result.

    Every backward pass gets its own graph: with a retained graph, an operation that overwrites its saved tensors would
    run on its own output.
    """

    def gradients(output: Any) -> tuple[Tensor, ...]:
        first = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(first, candidate.leaves, candidate.gradient)

    def without() -> Any:
        with torch.no_grad():
            return candidate.call()

    if mode == "backward":
        return candidate.call, gradients
    run = {"forward": candidate.call, "no-grad": without, "full": lambda: gradients(candidate.call())}[mode]
    return lambda: None, lambda _: run()


def timed(
    prepare: Callable[[], Any], run: Callable[[Any], Any], device: torch.device, rep: float, split: bool
) -> Timing:
    """Quantiles of the time of `run`, on a GPU with a flushed L2 cache. split: `prepare` runs before each `run`."""
    if device.type != "cuda":
        return _timed_on_cpu(prepare, run, rep)
    if not split:
        ready = prepare()
        found: Any = triton.testing.do_bench(lambda: run(ready), rep=int(rep), quantiles=list(QUANTILES))
        return Timing(*found)
    # As do_bench, with `prepare` outside the timed events.
    driver: Any = triton.runtime.driver.active
    cache = driver.get_empty_cache_for_benchmark()

    def once() -> tuple[Any, Any]:
        ready = prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        driver.clear_cache(cache)
        begin.record()
        run(ready)
        end.record()
        return begin, end

    for _ in range(3):
        begin, end = once()
    torch.cuda.synchronize(device)
    count = min(max(int(rep / max(begin.elapsed_time(end), 1e-3)), 5), 1000)
    events = [once() for _ in range(count)]
    torch.cuda.synchronize(device)
    return quantiles([begin.elapsed_time(end) for begin, end in events])


def _timed_on_cpu(prepare: Callable[[], Any], run: Callable[[Any], Any], rep: float) -> Timing:
    run(prepare())
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < rep and len(taken) < 25):
        ready = prepare()
        begin = time.perf_counter()
        run(ready)
        taken.append((time.perf_counter() - begin) * 1e3)
    return quantiles(taken)


def quantiles(milliseconds: list[float]) -> Timing:
    values = torch.tensor(milliseconds, dtype=torch.float64)
    return Timing(*torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist())


def floor_ms(floors: list[Floor], device: torch.device, rep: float) -> float:
    """Milliseconds of the longest of `floors`."""
    return max(
        floor.scale * timed(lambda: None, lambda _, call=floor.call: call(), device, rep, split=False).median
        for floor in floors
    )


def roofline(dtype: torch.dtype, device: torch.device, rep: float) -> tuple[float, float]:
    """Measured TFLOP/s of a large GEMM and GB/s of a large copy."""
    flops, count = (2 * 8192**3, 2**31) if device.type == "cuda" else (2 * 512**3, 2**26)
    gemm = floor_ms([gemm_floor(flops, dtype, device)], device, rep)
    copy = floor_ms([copy_floor(count, device)], device, rep)
    return flops / gemm / 1e9, count / copy / 1e6


def errors(candidate: Candidate, exact: list[Tensor]) -> list[float]:
    """Relative errors of the result and of each gradient, in the Frobenius norm."""
    output = candidate.call()
    first = output[0] if isinstance(output, tuple) else output
    gradients = torch.autograd.grad(first, candidate.leaves, candidate.gradient)
    found = candidate.restore(output, list(gradients))
    return [_distance(a.detach(), b) for a, b in zip(found, exact, strict=True)]


def _distance(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return float("inf")
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def wrong(found: list[float], eager: list[float], dtype: torch.dtype) -> bool:
    """Whether errors exceed FlashAttention's limit: twice eager PyTorch's error in the same dtype. NaN exceeds it."""
    return not all(ours <= 2 * theirs + SLACK[dtype] for ours, theirs in zip(found, eager, strict=True))


def peak_bytes(prepare: Callable[[], Any], run: Callable[[Any], Any], device: torch.device) -> int | None:
    """Peak memory of the allocator during `run`, minus that allocated before `prepare`; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    ready = prepare()
    torch.cuda.reset_peak_memory_stats(device)
    run(ready)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Clock(NamedTuple):
    megahertz: int
    celsius: int

    def __str__(self) -> str:
        return f"{self.megahertz} MHz {self.celsius} C"


def clock(device: torch.device) -> Clock | None:
    """Current SM clock and temperature; None without a GPU or nvidia-smi."""
    if device.type != "cuda":
        return None
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{identity}"] if identity else []
    command = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits", *which]
    first, *_ = (_output(command) or "").splitlines() or [""]
    try:
        megahertz, celsius = map(int, first.split(","))
    except ValueError:  # no nvidia-smi, or "[N/A]"
        return None
    return Clock(megahertz, celsius)


def drift(before: Clock | None, after: Clock | None) -> float:
    """Relative change of the clock; 0 if it cannot be read."""
    return abs(after.megahertz / before.megahertz - 1) if before and after else 0.0


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({models[0] if models else platform.processor() or platform.machine()}), no GPU"


def commit() -> str:
    """Commit of the checkout that contains this file, `-dirty` with changes; empty outside a checkout."""
    folder = str(Path(__file__).resolve().parent)
    return _output(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]) or ""


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
