"""Differences between runs: settings, environment, losses of the same steps, samples, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...data.processes import from_process
from ...slurm.io import newest_records
from ..io import flat
from ..monitors.columns import Lines, blocks
from ..monitors.metrics import iter_metrics
from .drawing import COLOURS, Chart, Curve, Points, chart
from .files import METRICS, RunFiles
from .page import template
from .same_steps import Rows, SameSteps, matched
from .series import Mean, Series
from .summary import Summary

WINDOW = 4
"""Final losses are those of the last 1/WINDOW of the steps that all runs have."""
CURVES = {
    "loss": "loss, smoothed",
    "samples_per_s": "samples per second",
    "mfu": "MFU",
    "tflops_per_device": "useful TFLOP/s per device",
    "peak_memory_gib": "peak memory, GiB",
    "grad_norm": "gradient norm, smoothed",
    "lr": "learning rate",
}
SMOOTH = ("loss", "grad_norm")
LARGE = 1 << 25
"""Bytes of a metrics file from which each file is read by a process of its own."""


@dataclass
class Read:
    """What `compare` needs of several metrics files at once."""

    window: tuple[int, int] | None
    """The last steps that all runs have, of which the final losses are; None if no step is common to all."""
    losses: list[Mean]
    """Of each run, the losses in the window."""
    same: list[SameSteps]
    """Of each run but the first, against the first."""


def read(runs: Sequence[RunFiles]) -> Read:
    """Read the metrics of the runs, two or more, into their summaries, and compare them line by line."""
    found = Read(_window(runs), [Mean() for _ in runs], [SameSteps() for _ in runs[1:]])
    files = [run.folder / METRICS for run in runs]
    large = max((file.stat().st_size for file in files if file.exists()), default=0) >= LARGE

    def rows(number: int) -> Iterator[Rows]:
        metrics = runs[number].metrics
        arguments = metrics, files[number], found.window
        for part in from_process(_read, *arguments) if large else _read(*arguments):
            if isinstance(part, Rows):
                yield part
            else:
                summary, found.losses[number] = part
                metrics.load(summary)

    for number, same in enumerate(found.same, 1):
        again = (Rows.of(part) for part in blocks(iter_metrics(files[0])) if isinstance(part, Lines))
        for mine, others in matched(rows(0) if number == 1 else again, rows(number)):
            same.add(mine, others)
    return found


def _read(metrics: Summary, file: Path, window: tuple[int, int] | None) -> Iterator[Rows | tuple[Summary, Mean]]:
    """The rows of a file; at last its summary, and the losses in the window."""
    losses = Mean()
    first, last = window or (math.inf, -math.inf)
    for lines in metrics.read(file):
        new = Rows.of(lines)
        inside = zip(new.steps, new.losses, strict=True) if new.steps[-1] >= first else ()
        losses.extend(loss for step, loss in inside if first <= step <= last and isinstance(loss, (int, float)))
        yield new
    yield metrics, losses


def _window(runs: Sequence[RunFiles]) -> tuple[int, int] | None:
    """See `Read.window`: the last 1/WINDOW of the steps at which all runs have a loss."""
    begin, end = -math.inf, math.inf
    for run in runs:
        file = run.folder / METRICS
        both = chain.from_iterable(iter_metrics(file)), newest_records(file)
        first, last = (next(filter(_has_loss, records), None) for records in both)
        if first is None or last is None:
            return None
        begin, end = max(begin, first["step"]), min(end, last["step"])
    return None if end < begin else (int(end - (end - begin) / WINDOW), int(end))


def _has_loss(record: dict[str, Any]) -> bool:
    return (
        "event" not in record and isinstance(record.get("step"), int) and isinstance(record.get("loss"), (int, float))
    )


def compare(runs: Sequence[RunFiles], found: Read) -> dict[str, Any]:
    """`runs`: their names; `figures`: name -> values; `loss`: see `last_losses`; `against_first`: per other run, losses
    and samples of the same steps; `settings` and `environment`: differing key -> values. Values are listed in the order
    of the runs, None for a run without one."""
    against = [
        {"run": run.name, **same.losses(), **same.samples()} for run, same in zip(runs[1:], found.same, strict=True)
    ]
    return {
        "runs": [run.name for run in runs],
        "figures": {name: [of(run) for run in runs] for name, of in FIGURES.items()},
        "loss": last_losses(runs, found),
        "against_first": against,
        "settings": differing([run.recipe for run in runs], besides=("name",)),
        "environment": differing([{**run.environment, "kernels": _kernels(run)} for run in runs], besides=("hosts",)),
    }


def last_losses(runs: Sequence[RunFiles], found: Read) -> dict[str, Any] | None:
    """Mean and standard deviation of each run's logged losses in `window`, the last steps that all runs have, and the
    smoothed loss at its end; None if no step is common to all."""
    if found.window is None:
        return None
    curves = [_curve(run, "loss").smoothed() for run in runs]
    return {
        "window": list(found.window),
        "lines": [losses.count for losses in found.losses],
        "mean": [losses.mean for losses in found.losses],
        "std": [losses.deviation for losses in found.losses],
        "smoothed": [
            next((loss for step, loss in reversed(curve) if step <= found.window[1]), curve[0][1]) for curve in curves
        ],
    }


def _curve(run: RunFiles, key: str) -> Series:
    return run.metrics.curves.get(key, Series())


def differing(trees: Sequence[dict[str, Any]], besides: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Dotted key -> its value in each tree, for values that differ."""
    leaves = [dict(flat(tree)) for tree in trees]
    keys = dict.fromkeys(key for each in leaves for key in each)
    found = {key: [each.get(key) for each in leaves] for key in keys if key and key not in besides}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values[1:])}


def page(runs: Sequence[RunFiles], read: Read, found: dict[str, Any]) -> str:
    """The comparison `found` as HTML, with overlaid curves."""
    return template("compare").render(
        found=found,
        runs=runs,
        charts=charts(runs, read),
        tables=tables(found),
        colours=[_colour(i) for i in range(len(runs))],
    )


def charts(runs: Sequence[RunFiles], read: Read) -> list[Chart]:
    drawn = []
    for key, title in CURVES.items():
        shown: Callable[[Series], Points] = Series.smoothed if key in SMOOTH else Series.drawn
        each = [Curve(run.name, shown(_curve(run, key)), _colour(i)) for i, run in enumerate(runs)]
        drawn.append(chart(title, each, zero=key not in SMOOTH, falls=key in SMOOTH))
    others = zip(runs[1:], read.same, strict=True)
    apart = [Curve(run.name, same.apart.drawn(), _colour(i)) for i, (run, same) in enumerate(others, 1)]
    drawn.insert(1, chart(f"loss minus that of {runs[0].name}, same steps", apart))
    return [each for each in drawn if each is not None]


def tables(found: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Heading -> column heads and rows, for the terminal and the page."""
    names = found["runs"]
    figures = [
        [name, *map(_number, values)]
        for name, values in found["figures"].items()
        if any(value is not None for value in values)
    ]
    if loss := found["loss"]:
        first, last = loss["window"]
        pairs = zip(loss["mean"], loss["std"], strict=True)
        spread = [_number(mean) + ("" if std is None else f" ± {std:.2g}") for mean, std in pairs]
        figures.append([f"loss, steps {first:,} to {last:,}", *spread])
        figures.append([f"loss, smoothed, at step {last:,}", *map(_number, loss["smoothed"])])
    made: dict[str, tuple[list[str], list[list[str]]]] = {"Figures": (["", *names], figures)}
    rows = [[row["run"], _losses(row), _samples(row)] for row in found["against_first"]]
    made[f"The same steps as {names[0]}"] = (["", "loss", "samples"], rows)
    for title, part in (("Settings that differ", "settings"), ("Environment that differs", "environment")):
        rows = [[key, *map(_setting, values)] for key, values in found[part].items()]
        made[title] = (["", *names], rows)
    return made


def _losses(row: dict[str, Any]) -> str:
    if not row["lines"]:
        return "no step logged by both"
    lines = f"{row['lines']:,} line{'s' * (row['lines'] > 1)}"
    if row["equal"]:
        return f"equal to the bit on {lines}"
    return (
        f"{row['mean_difference']:+.3g} on average over {lines}, {row['mean_distance']:.3g} in absolute value,"
        f" at most {row['largest']:+.3g} (step {row['largest_at']:,}), last {row['last']:+.3g}"
    )


def _samples(row: dict[str, Any]) -> str:
    same, apart = row["same_samples_to"], row["other_samples_at"]
    if apart is not None:
        return f"different from step {apart:,}" + (f", the same up to step {same:,}" if same else "")
    return f"the same up to step {same:,}" if same else "unknown"


def _median(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.metrics.medians[key].value()


def _last(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.metrics.last_values.get(key)


def _waiting(run: RunFiles) -> float | None:
    spent = run.metrics.step_s
    return run.metrics.data_wait_s / spent if spent else None


def _goodput(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.goodput[key] if run.goodput else None


FIGURES: dict[str, Callable[[RunFiles], float | None]] = {
    "steps": lambda run: run.metrics.last["step"] if run.metrics.last else None,
    "samples": _last("samples"),
    "samples/s, median": _median("samples_per_s"),
    "tokens/s, median": _median("tokens_per_s"),
    "s per step, median": _median("step_s"),
    "TFLOP/s per device, median": _median("tflops_per_device"),
    "MFU, median": _median("mfu"),
    "HFU, median": _median("hfu"),
    "share waiting for data": _waiting,
    "peak memory, GiB": _last("peak_memory_gib"),
    "headroom, GiB": _last("memory_headroom_gib"),
    "allocator retries": _last("alloc_retries"),
    "steps skipped": _last("skipped_steps"),
    "effective training time": _goodput("ettr"),
    "hours in total": lambda run: run.goodput["wall_s"] / 3600 if run.goodput else None,
    "attempts": _goodput("attempts"),
    "steps repeated": _goodput("lost_steps"),
}


def _kernels(run: RunFiles) -> dict[str, Any]:
    return {name: each.get("provider") for name, each in run.kernels.items() if isinstance(each, dict)}


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)
