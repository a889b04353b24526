"""Time every kernel against plain PyTorch, torch.compile and a floor measured on the same machine in the same run.

`python -m bifrost.kernels.bench --help`; needs only torch and Triton, and matplotlib for plots. Exit code 0; 1 when a
provider computes a wrong result, fails, or falls below `--fail-below`; 2 for invalid arguments.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from ..errors import first_line
from . import measure
from .arguments import BUILDERS, DTYPES, Plan, read_arguments
from .cases import Candidate, Mode, Problem, Shape
from .measure import SLACK, clock, drift, errors, floor_ms, peak_bytes, steps, timed, wrong
from .plots import draw
from .report import (
    HEADER,
    NOT_A_GPU,
    Environment,
    Row,
    below,
    line,
    records,
    upsert,
    verdict_table,
    verdicts,
    write_json,
)

DRIFT = 0.05
"""Relative change of the clock during one problem from which its rows are marked as unreliable."""


@dataclasses.dataclass
class Run:
    """One benchmark run: its plan and its results."""

    device: torch.device
    plan: Plan
    rows: list[Row] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    printed: set[str] = dataclasses.field(default_factory=set)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def explain(self, problem: Problem) -> None:
        """Print which providers are missing and why: one line per reason, once."""
        for reason in dict.fromkeys(problem.skipped.values()):
            names = ", ".join(name for name, its in problem.skipped.items() if its == reason)
            text = f"{problem.kernel}: not timed: {names}: {reason}"
            if text not in self.printed:
                self.printed.add(text)
                print(text, flush=True)

    def measure(self, after: Callable[[], None]) -> None:
        """Time every kernel at every size and call `after` after each, so that an aborted run keeps its results. The
        smallest sizes are first; after the plan's limit no other begins."""
        print(HEADER + ("" if self.on_gpu else "  " + NOT_A_GPU), flush=True)
        begun = time.monotonic()
        sizes = [
            (kernel, shape, tokens)
            for tokens in self.plan.tokens
            for kernel in self.plan.kernels
            for shape in self.plan.shapes
        ]
        for number, size in enumerate(sizes):
            if self.plan.limit is not None and time.monotonic() - begun > self.plan.limit:
                left = ", ".join(
                    f"{kernel} D={shape.width} {tokens} tokens" for kernel, shape, tokens in sizes[number:]
                )
                print(f"not measured within --limit {self.plan.limit:g} s: {left}")
                return
            self.problem(*size)
            after()
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def problem(self, kernel: str, shape: Shape, tokens: int) -> None:
        where = f"{kernel} D={shape.width} {tokens} tokens"
        try:
            # Eager always runs: its error is the limit for the other providers.
            problem = BUILDERS[kernel](
                shape,
                tokens,
                DTYPES[self.plan.dtype],
                self.device,
                lambda name: name == "eager" or name in self.plan.providers,
            )
            self.explain(problem)
            floors = {mode: floor_ms(problem.floors(mode), self.device, self.plan.rep) for mode in self.plan.modes}
            before = clock(self.device)  # right after the floor, since the clock of an idle GPU is meaningless
            found = self.check(problem, where)
        except torch.OutOfMemoryError:
            print(f"{where}: does not fit in the memory of this device")
            return
        first = len(self.rows)
        for candidate, error in found:
            for mode in self.plan.modes:
                try:
                    self.rows.append(self.time(problem, candidate, mode, floors[mode], error, str(before or "")))
                except Exception as problem_error:
                    self.give_up(where, candidate, problem_error)
                    break
                print(line(self.rows[-1], self.on_gpu), flush=True)
        after = clock(self.device)
        if drift(before, after) > DRIFT:
            print(f"warning: {where}: the clock went from {before} to {after}; measure these rows again")
            self.rows[first:] = [dataclasses.replace(row, clocks=f"{before} -> {after}") for row in self.rows[first:]]

    def check(self, problem: Problem, where: str) -> list[tuple[Candidate, float]]:
        """Candidates with a correct result, each with its largest relative error, eager first."""
        exact = problem.exact()
        limits = [SLACK[DTYPES[self.plan.dtype]]] * len(exact)
        right = []
        for candidate in problem.candidates:
            try:
                error = errors(candidate, exact)
            except Exception as problem_error:
                self.give_up(where, candidate, problem_error)
                continue
            if candidate.provider == "eager":
                limits = error
            elif wrong(error, limits, DTYPES[self.plan.dtype]):
                text = f"WRONG: {where}: {candidate.provider} has error {max(error):.1e}, eager {max(limits):.1e}"
                print(f"{text}; not timed", flush=True)
                self.failed.append(text)
                continue
            if candidate.provider in self.plan.providers:
                right.append((candidate, max(error)))
        return right

    def give_up(self, where: str, candidate: Candidate, error: Exception) -> None:
        """Report a failed candidate. Running out of memory is allowed, and so is the failure of a baseline; any other
        failure fails the run."""
        if isinstance(error, torch.OutOfMemoryError):
            print(f"{where}: {candidate.provider} does not fit in the memory of this device", flush=True)
            return
        text = f"{where}: {candidate.provider} failed: {first_line(error)}"
        print(text, flush=True)
        if not candidate.baseline:
            self.failed.append(text)

    def time(self, problem: Problem, candidate: Candidate, mode: Mode, floor: float, error: float, clocks: str) -> Row:
        prepare, run = steps(candidate, mode)
        timing = timed(prepare, run, self.device, self.plan.rep, split=mode == "backward")
        same = {
            row.provider: row.timing.median
            for row in self.rows
            if (row.kernel, row.shape, row.tokens, row.mode) == (problem.kernel, problem.shape, problem.tokens, mode)
        }
        same[candidate.provider] = timing.median
        over = {name: same[name] / timing.median if name in same else None for name in ("eager", "compile")}
        return Row(
            kernel=problem.kernel,
            provider=candidate.provider,
            baseline=candidate.baseline,
            mode=mode,
            shape=problem.shape,
            tokens=problem.tokens,
            dtype=self.plan.dtype,
            timing=timing,
            floor_ms=floor,
            flops=problem.work[mode].flops,
            bytes=problem.work[mode].bytes,
            peak=peak_bytes(prepare, run, self.device),
            error=error,
            over_eager=over["eager"],
            over_compile=over["compile"],
            config=candidate.config,
            clocks=clocks,
            details=problem.details,
        )


def compile_table() -> None:
    """Print resources of every kernel on other GPUs. Runs in a separate process, because this one interprets Triton."""
    print(
        "\nCompiled without a GPU: registers per thread, spilled and shared bytes, warps, matrix instructions",
        flush=True,
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1"}
    ended = subprocess.run([sys.executable, "-m", "bifrost.kernels.compile_check"], env=environment)
    if ended.returncode:
        print(f"the compile check ended with {ended.returncode}: see its lines, or run `bifrost kernels check`")


def main(arguments: Sequence[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = read_arguments(arguments, device)
    run = Run(device, plan)
    name = measure.device_name(device)
    print(f"{name}; torch {torch.__version__}, Triton {measure.triton.__version__}, {plan.dtype}")
    if not run.on_gpu:
        torch.set_num_threads(1)  # otherwise threads that wait for a busy core dominate the time
        print(f"No GPU: all rows below are for one CPU thread ({NOT_A_GPU}); Triton kernels are not timed.")
        if "compile" not in plan.providers:
            print("torch.compile is left out on a CPU, where it takes minutes to build: add it with --provider.")
    roofline = measure.roofline(DTYPES[plan.dtype], device, plan.rep)
    start = clock(device)
    note = "" if run.on_gpu else "  " + NOT_A_GPU
    print(f"roofline: GEMM {roofline[0]:.3g} TFLOP/s, copy {roofline[1]:.0f} GB/s{note}\n")
    environment = Environment(name, run.on_gpu, measure.commit(), plan.dtype, *roofline, str(start or ""))

    def write() -> None:
        if plan.csv:
            upsert(plan.csv, records(run.rows, environment))
        if plan.json:
            write_json(plan.json, run.rows, dataclasses.replace(environment, clocks_after=str(clock(device) or "")))

    run.measure(write)
    if start:
        print(f"\nclock {start} before, {clock(device)} after")
    if plan.plots and run.rows:
        written = draw(run.rows, environment, plan.plots)
        print("no plots: matplotlib is not installed" if written is None else f"{len(written)} plots written")
    if not run.on_gpu:
        if plan.fail_below is not None:
            print("--fail-below is ignored: there is no GPU")
        if plan.kernels == list(BUILDERS):
            compile_table()
        return 1 if run.failed else 0
    if found := verdicts(run.rows):
        print("\n" + verdict_table(found))
    short = [] if plan.fail_below is None else below(run.rows, plan.fail_below)
    for text in short:
        print(f"BELOW: {text}")
    return 1 if run.failed or short else 0


if __name__ == "__main__":
    sys.exit(main())
