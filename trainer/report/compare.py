"""Differences between runs: settings, environment, losses of the same steps, samples, speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..io import flat
from ..training.data_digest import comparable
from .drawing import COLOURS, Chart, Curve, chart, smoothed
from .files import RunFiles
from .page import template

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


def compare(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """`runs`: their names; `figures`: name -> values; `loss`: see `last_losses`; `against_first`: per other run, losses
    and samples of the same steps; `settings` and `environment`: differing key -> values. Values are listed in the order
    of the runs, None for a run without one."""
    return {
        "runs": [run.name for run in runs],
        "figures": {name: [of(run) for run in runs] for name, of in FIGURES.items()},
        "loss": last_losses(runs),
        "against_first": [{"run": run.name, **same_steps(runs[0], run), **samples(runs[0], run)} for run in runs[1:]],
        "settings": differing([run.recipe for run in runs], besides=("name",)),
        "environment": differing([{**run.environment, "kernels": _kernels(run)} for run in runs], besides=("hosts",)),
    }


def last_losses(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """Mean and standard deviation of each run's logged losses in `window`, the last steps that all runs have, and the
    smoothed loss at its end; None if no step is common to all."""
    curves = [run.column("loss") for run in runs]
    if not all(curves):
        return None
    begin, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if end < begin:
        return None
    window = [int(end - (end - begin) / WINDOW), int(end)]
    inside = [[loss for step, loss in curve if window[0] <= step <= end] for curve in curves]
    return {
        "window": window,
        "lines": [len(losses) for losses in inside],
        "mean": [statistics.fmean(losses) if losses else None for losses in inside],
        "std": [statistics.stdev(losses) if len(losses) > 1 else None for losses in inside],
        "smoothed": [[loss for step, loss in smoothed(curve) if step <= end][-1] for curve in curves],
    }


def same_steps(first: RunFiles, other: RunFiles) -> dict[str, Any]:
    """`lines`: number of steps for which both logged a loss; the differences, other minus first."""
    before, after = dict(first.column("loss")), dict(other.column("loss"))
    both = sorted(before.keys() & after.keys())
    if not both:
        return {"lines": 0}
    apart = [after[step] - before[step] for step in both]
    worst = max(range(len(both)), key=lambda i: abs(apart[i]))
    return {
        "lines": len(both),
        "equal": not any(apart),
        "mean_difference": statistics.fmean(apart),
        "mean_distance": statistics.fmean(map(abs, apart)),
        "largest": apart[worst],
        "largest_at": both[worst],
        "last": apart[-1],
    }


def samples(first: RunFiles, other: RunFiles) -> dict[str, Any]:
    """The last logged step up to which both consumed the same samples, and the first at which they had not; None if
    there is no such step."""
    before, after = ({line["step"]: line.get("data_digest") for line in run.steps} for run in (first, other))
    both = sorted(step for step in before.keys() & after.keys() if comparable(before[step], after[step]))
    apart = next((step for step in both if before[step] != after[step]), None)
    same = [step for step in both if apart is None or step < apart]
    return {"same_samples_to": same[-1] if same else None, "other_samples_at": apart}


def differing(trees: Sequence[dict[str, Any]], besides: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Dotted key -> its value in each tree, for values that differ."""
    leaves = [dict(flat(tree)) for tree in trees]
    keys = dict.fromkeys(key for each in leaves for key in each)
    found = {key: [each.get(key) for each in leaves] for key in keys if key and key not in besides}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values[1:])}


def page(runs: Sequence[RunFiles], found: dict[str, Any]) -> str:
    """The comparison `found` as HTML, with overlaid curves."""
    return template("compare").render(
        found=found,
        runs=runs,
        charts=charts(runs),
        tables=tables(found),
        colours=[_colour(i) for i in range(len(runs))],
    )


def charts(runs: Sequence[RunFiles]) -> list[Chart]:
    drawn = []
    for key, title in CURVES.items():
        shown: Callable[..., Any] = smoothed if key in SMOOTH else list
        each = [Curve(run.name, shown(run.column(key)), _colour(i)) for i, run in enumerate(runs)]
        drawn.append(chart(title, each, zero=key not in SMOOTH, falls=key in SMOOTH))
    base = dict(runs[0].column("loss"))
    apart = [
        Curve(run.name, [(step, loss - base[step]) for step, loss in run.column("loss") if step in base], _colour(i))
        for i, run in enumerate(runs)
        if i
    ]
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
    def of(run: RunFiles) -> float | None:
        values = [value for _, value in run.column(key)]
        return statistics.median(values) if values else None

    return of


def _last(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: next((value for _, value in reversed(run.column(key))), None)


def _waiting(run: RunFiles) -> float | None:
    spent = sum(line["step_s"] for line in run.steps if "step_s" in line)
    return sum(line.get("data_wait_s", 0.0) for line in run.steps) / spent if spent else None


def _goodput(key: str) -> Callable[[RunFiles], float | None]:
    return lambda run: run.goodput[key] if run.goodput else None


FIGURES: dict[str, Callable[[RunFiles], float | None]] = {
    "steps": lambda run: run.steps[-1]["step"] if run.steps else None,
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
