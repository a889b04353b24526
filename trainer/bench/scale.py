"""`bifrost bench scale`: a recipe's first steps on several numbers of ranks, and the scaling efficiency.

Weak: every rank has `micro_batch` samples and one pass per step, so that the global batch grows with the ranks. Strong:
the recipe's `global_batch` on any number. Each point is a separate file in the output folder, so that jobs of different
sizes can add theirs; table and plot cover all points in the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ...recipes import BatchSplit
from ...slurm.rank_env import host_name
from ..distributed.launcher import run_ranks
from ..errors import RunError
from ..planner import batch
from ..terminal import terminal
from .collectives import Clock
from .machine import format_machine, machine, usable_cores, write_record
from .profile import works
from .short_run import WARMUP, ShortRun

Mode = Literal["weak", "strong"]
MODES: tuple[Mode, ...] = ("weak", "strong")


def run_points(
    global_batch: int, micro_batch: int, modes: Sequence[Mode], counts: Sequence[int], out: Path, arguments: list[str]
) -> int:
    """Measure every mode on every number of local ranks, one by one, with `bench scale ARGUMENTS`; then show all
    points. Returns the exit code of the first failure."""
    chosen: list[tuple[Mode, int]] = [(mode, count) for mode in modes for count in counts]
    for mode, count in chosen:
        split(mode, global_batch, micro_batch, count)  # check that the batch divides before anything runs
    os.environ["OMP_NUM_THREADS"] = "1"  # one core per rank: more would scale differently at every number of ranks
    for mode, count in chosen:
        code = run_ranks(count, ["bench", "scale", *arguments, f"--mode={mode}"])
        if code:
            return code
    present(out)
    return 0


def split(mode: Mode, global_batch: int, micro_batch: int, ranks: int) -> BatchSplit:
    """The batch of a point. RunError if it does not divide."""
    return batch(micro_batch * ranks if mode == "weak" else global_batch, micro_batch, ranks)


def folder(mode: Mode, ranks: int, out: Path) -> Path:
    """Folder of the run of a point, in `out`."""
    return out / f".{mode}-{ranks}"


def measure(run: ShortRun, mode: Mode, sizes: BatchSplit, out: Path) -> int:
    """Train a short run on this rank; rank 0 writes the point to `out`. Returns the exit code."""
    communication = [0.0, 0.0]
    gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) if gpu else None

    with Clock().running() as clock:

        def begin() -> None:
            communication[0] = clock.seconds
            if profiler:
                profiler.start()

        def end() -> None:
            communication[1] = clock.seconds
            if profiler:
                torch.cuda.synchronize()
                profiler.stop()

        code = run.measure(begin, end)
    spent = communication[1] - communication[0]
    if profiler:  # calls return immediately on a GPU: use kernel time
        spent = sum(w.microseconds for w in works(profiler.events() or []) if w.kind == "communication") / 1e6
    mine: Rank = (host_name(), usable_cores(), spent)
    found = [mine]
    if sizes.ranks > 1:
        found = [mine] * sizes.ranks
        dist.all_gather_object(found, mine)
    if dist.get_rank() == 0 and code == 0:
        lines = (run.folder / run.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        one = point(run.name, sizes, mode, found, [json.loads(line) for line in lines])
        write_record(out, f"{mode}-{sizes.ranks:04d}.json", one)
        shutil.rmtree(run.folder, ignore_errors=True)
        if "BIFROST_LAUNCHER" not in os.environ:  # started by srun or torchrun: no launcher does it
            present(out)
    dist.destroy_process_group()  # its threads may abort a process that exits while they run
    return code


Rank = tuple[str, Sequence[int], float]
"""A rank's host, the cores available to it, and its seconds in collectives over the measured steps."""


def point(
    name: str, sizes: BatchSplit, mode: Mode, found: Sequence[Rank], lines: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The record of a point from its ranks and its metrics. name: the recipe's."""
    communication = [spent for *_, spent in found]
    measured = [line for line in lines if "event" not in line and line["step"] > WARMUP]
    step_s = statistics.median(line["step_s"] for line in measured)
    whole = sum(line["step_s"] for line in measured)
    gpus = torch.cuda.is_available()
    return {
        "mode": mode,
        "recipe": name,
        "ranks": sizes.ranks,
        "units": sizes.ranks if gpus else cores_in_use(found),
        "unit": "GPU" if gpus else "core",
        "global_batch": sizes.global_batch,
        "micro_batch": sizes.micro_batch,
        "passes": sizes.passes,
        "steps": len(measured),
        "step_s": step_s,
        "samples_per_s": sizes.global_batch / step_s,
        "data_wait_share": sum(line["data_wait_s"] for line in measured) / whole,
        "communication_share": statistics.mean(communication) / whole,
        "communication_share_least": min(communication) / whole,
        "communication_share_most": max(communication) / whole,
        "straggler": statistics.median(
            line["rank_work_s_max"] / max(line["rank_work_s_median"], 1e-9) for line in measured
        ),
        "machine": machine("deepspeed"),
    }


def present(out: Path) -> None:
    """Print all points of a folder and plot them to its `scale.png`."""
    modes = read_points(out)
    show(modes)
    draw(modes, out / "scale.png")


def cores_in_use(found: Sequence[Rank]) -> int:
    """Cores in use by the ranks: one each, at most those of their hosts."""
    hosts: dict[str, list[Sequence[int]]] = {}
    for host, own, _ in found:
        hosts.setdefault(host, []).append(own)
    return sum(min(len(each), len({core for own in each for core in own})) for each in hosts.values())


def read_points(out: Path) -> dict[Mode, list[dict[str, Any]]]:
    """All points of a folder by mode, in order of ranks, each with its `efficiency`: throughput per unit (core or GPU)
    relative to the mode's first point. RunError if they are of different recipes."""
    found: dict[Mode, list[dict[str, Any]]] = {
        mode: [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob(f"{mode}-*.json"))]
        for mode in MODES
    }
    names = {one["recipe"] for points in found.values() for one in points}
    if len(names) > 1:
        raise RunError(f"--out {out}: contains points of {', '.join(sorted(names))}; give another folder")
    for points in found.values():
        for one in points:
            one["efficiency"] = _per_unit(one) / _per_unit(points[0])
    return {mode: points for mode, points in found.items() if points}


def _per_unit(one: dict[str, Any]) -> float:
    return one["samples_per_s"] / one["units"]


def show(modes: dict[Mode, list[dict[str, Any]]]) -> None:
    """Print every point."""
    console = terminal()
    for mode, points in modes.items():
        unit = points[0]["unit"]
        title = {"weak": "Weak scaling: fixed micro_batch per rank", "strong": "Strong scaling: fixed global_batch"}[
            mode
        ]
        heads = ("ranks", f"{unit}s", "micro x passes", "step s", "samples/s", f"per {unit}", "efficiency")
        table = Table(*heads, "data", "communication", "slowest / median", title=title, title_justify="left")
        for one in points:
            least, most = one["communication_share_least"], one["communication_share_most"]
            table.add_row(
                str(one["ranks"]),
                str(one["units"]),
                f"{one['micro_batch']} x {one['passes']}",
                f"{one['step_s']:.3f}",
                f"{one['samples_per_s']:.1f}",
                f"{_per_unit(one):.1f}",
                f"{one['efficiency']:.0%}",
                f"{one['data_wait_share']:.0%}",
                f"{one['communication_share']:.0%} ({least:.0%} to {most:.0%})",
                f"{one['straggler']:.2f}",
            )
        console.print(table)
        over = [one["ranks"] for one in points if unit == "core" and one["ranks"] > one["units"]]
        if over:
            console.print(
                f"{', '.join(map(str, over))} ranks share {max(one['units'] for one in points)} cores: these rows show"
                " the cost of more processes, not the gain of more machines.",
                soft_wrap=True,
            )
    console.print(format_machine(next(iter(modes.values()))[0]["machine"]), soft_wrap=True)


def draw(modes: dict[Mode, list[dict[str, Any]]], file: Path) -> None:
    """Plot throughput, efficiency per core or GPU, and communication over the ranks, as a PNG."""
    from matplotlib.figure import Figure

    first = next(iter(modes.values()))[0]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(f"{first['recipe']}, measured: {format_machine(first['machine'])}", fontsize=9)
    for axes, key, scale, label in zip(
        figure.subplots(1, 3),
        ("samples_per_s", "efficiency", "communication_share"),
        (1, 100, 100),
        ("samples/s", f"% of the first point's throughput per {first['unit']}", "% of a step in collectives"),
        strict=True,
    ):
        for mode, points in modes.items():
            axes.plot([p["ranks"] for p in points], [scale * p[key] for p in points], marker="o", label=mode)
        counts = sorted({p["ranks"] for points in modes.values() for p in points})
        axes.set(xscale="log", xlabel="ranks", ylabel=label)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(color="#e2e8f0")
        axes.legend(frameon=False)
    figure.savefig(file, format="png", dpi=110)
