"""A recipe's plan against counts of its step on the phantom GPU. Imports no torch: each count has its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...data.progress import progress
from ...slurm.exit_codes import USAGE
from ..errors import RunError
from ..planner import NODE
from ..planner.layout import AS_SET, Workload
from ..planner.memory import Memory, memory
from ..planner.part import Part
from ..planner.timing import done_flops, working
from .device import build

if TYPE_CHECKING:
    from rich.console import Console

FLOPS, KEPT, PEAK, HELD = 0.005, 0.02, 0.10, 0.01
"""Largest relative differences of a count from the plan."""
SMALL_KEPT = 16e3
"""Bytes per sample that a count of what is kept may have in addition: indices, and scalars per token or layer."""
SMALL_PEAK = 100e6
"""Bytes below which the peak of a pass is not compared: in so small a model it is that of a frozen text encoder or VAE,
which a plan does not count."""
READS = 1
"""Values that the host may read in a step."""
PASS = ("activations", "recomputed layer", "gradients of activations", "dequantized layer")
"""What a plan adds in a pass on a device that holds all weights, where nothing is gathered or reduced; and the gradient
of one weight, of which the engine has a copy too."""


@dataclass(frozen=True)
class Row:
    """A planned and a counted figure, in FLOPs or bytes. tolerance: relative to the count; slack: in addition."""

    what: str
    unit: str
    planned: float
    counted: float
    tolerance: float
    slack: float = 0.0

    @property
    def difference(self) -> float:
        """Of the plan from the count, relative."""
        return self.planned / self.counted - 1 if self.counted else float(self.planned > 0)

    @property
    def agrees(self) -> bool:
        return abs(self.planned - self.counted) <= self.tolerance * self.counted + self.slack

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "difference": self.difference, "agrees": self.agrees}

    def cells(self) -> tuple[str, ...]:
        scale = 1e12 if self.unit == "TFLOP" else 1e9
        figures = (f"{value / scale:.4g} {self.unit}" for value in (self.planned, self.counted))
        return self.what, *figures, f"{self.difference:+.2%}", f"{self.tolerance:.1%}", "yes" if self.agrees else "NO"


@dataclass(frozen=True)
class Check:
    """Planned next to counted figures. problems: what a run on a GPU must not do, a line each."""

    rows: list[Row]
    problems: list[str]

    @property
    def agrees(self) -> bool:
        return not self.problems and all(row.agrees for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        return {"agrees": self.agrees, "rows": [row.as_json() for row in self.rows], "problems": self.problems}

    def show(self, console: Console, name: str) -> None:
        """name: of the recipe."""
        from rich.table import Table

        table = Table(title=f"{name}, planned and counted on a phantom GPU", title_justify="left")
        for head in ("", "planned", "counted", "difference", "tolerance", "agrees"):
            table.add_column(head, justify="right" if head else "left")
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)
        for problem in self.problems:
            console.print(f"- {problem}", soft_wrap=True)


def count(recipe: str, overrides: Sequence[str], text_tokens: int, ranks: int | None = None) -> dict[str, Any]:
    """The counts of a pass, or with `ranks` of the engine on one of so many; see `PassCounts` and `EngineCounts`.

    RunError if the phantom GPU is not available or the recipe cannot be used; RuntimeError with the end of the
    traceback if the step fails there, as it would on a GPU.
    """
    build()
    asked = {"recipe": recipe, "overrides": list(overrides), "text_tokens": text_tokens, "ranks": ranks}
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cuda", "TORCH_FR_BUFFER_SIZE": "0"}
    command = [sys.executable, "-m", "bifrost.trainer.phantom", json.dumps(asked)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode == USAGE:
        raise RunError(ended.stderr.splitlines()[-1])
    if ended.returncode:
        raise RuntimeError(f"the step fails on the phantom GPU:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def check(
    recipe: tuple[str, Sequence[str]], parts: Sequence[Part], work: Workload, gpus: Sequence[int], text_tokens: int
) -> Check:
    """The plan of `parts` compared with counts of a pass, and of the engine's steps on every number of `gpus`.

    recipe: its file or name, and overrides. text_tokens: of every prompt of stage 1. Errors as of `count`.
    """
    with progress("counting a pass"):
        counts = count(*recipe, text_tokens)
    rows, problems = pass_rows(parts, work, counts), pass_problems(counts)
    for ranks in gpus:
        with progress(f"counting steps of one of {ranks} ranks"):
            counts = count(*recipe, text_tokens, ranks)
        rows.append(held_row(parts, work, ranks, counts))
        problems += [line for line in engine_problems(counts) if line not in problems]
    return Check(rows, problems)


def pass_rows(parts: Sequence[Part], work: Workload, counts: dict[str, Any]) -> list[Row]:
    """A pass of the recipe's micro-batch: FLOPs and kept bytes per sample, and the peak unless it is small."""
    samples, planned = work.micro_batch, planned_memory(parts, work, 1)
    needed = planned.per_pass
    peak = sum(needed[name] for name in PASS) + needed["gradients of a layer"] / 2
    peak = max(peak, planned.encoding["encoder at work"])
    rows = [
        Row("FLOPs per sample", "TFLOP", done_flops(parts, work.recomputed), counts["flops"] / samples, FLOPS),
        Row("kept per sample", "GB", needed["activations"] / samples, counts["kept"] / samples, KEPT, SMALL_KEPT),
    ]
    return rows + ([Row("peak of a pass", "GB", peak, counts["peak"], PEAK)] if peak > SMALL_PEAK else [])


def held_row(parts: Sequence[Part], work: Workload, ranks: int, counts: dict[str, Any]) -> Row:
    """What the engine holds between steps on one of `ranks` ranks."""
    return Row(f"held on {ranks} GPUs", "GB", planned_memory(parts, work, ranks).static, counts["held"], HELD)


def planned_memory(parts: Sequence[Part], work: Workload, ranks: int) -> Memory:
    return memory(working(parts), work, AS_SET, ranks, NODE, work.micro_batch)


def pass_problems(counts: dict[str, Any]) -> list[str]:
    """The places where the host waits for the device, and the buffers that are not as they should be, a line each."""
    found = [f"the host waits for a value, {n} x: {place}" for place, n in counts["reads"].items()]
    found += [f"the host waits for a copy, {n} x: {place}" for place, n in counts["copies"].items()]
    return found + [f"buffer {line}" for line in counts["wrong"]]


def engine_problems(counts: dict[str, Any]) -> list[str]:
    """The same of a step of the engine, which reads one value, the gradient norm."""
    if sum(counts["reads"].values()) <= READS:
        counts = {**counts, "reads": {}}
    return pass_problems(counts) + ([] if counts["applied"] else ["a step did not update the weights"])
