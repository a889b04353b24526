"""Output of the benchmark: its table, CSV and JSON, the verdict on the targets, and results below a limit."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..runtime import triton
from .cases import Mode, Shape
from .measure import Timing

LIGER_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip
"""Columns of Liger-Kernel's benchmark data, in order."""
COLUMNS = (
    *LIGER_COLUMNS, "flops", "bytes", "tflops", "gbps", "pct_of_measured_floor", "error_vs_fp64", "config", "commit",
    "torch_version", "triton_version", "clocks",
)  # fmt: skip
KEY = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "x_name", "x_value",
    "extra_benchmark_config_str", "gpu_name",
)  # fmt: skip
"""Rows that agree in these columns are the same measurement, of which the latest is kept, as in Liger."""

NOT_A_GPU = "CPU, not a GPU figure"


@dataclass(frozen=True)
class Row:
    """One provider in one mode at one size."""

    kernel: str
    provider: str
    baseline: bool
    mode: Mode
    shape: Shape
    tokens: int
    dtype: str
    timing: Timing
    floor_ms: float
    flops: int
    bytes: int
    peak: int | None
    """Peak memory in bytes, without the inputs; None on a CPU."""
    error: float
    over_eager: float | None
    """Eager's time divided by this one's."""
    over_compile: float | None
    config: str
    clocks: str
    details: dict[str, Any]

    @property
    def tflops(self) -> float:
        return self.flops / self.timing.median / 1e9

    @property
    def gbps(self) -> float:
        return self.bytes / self.timing.median / 1e6

    @property
    def percent(self) -> float:
        """Percentage of the floor: 100 is as fast as the floor."""
        return 100 * self.floor_ms / self.timing.median

    @property
    def size(self) -> str:
        return f"{self.shape.model + ' ' if self.shape.model else ''}D={self.shape.width}"


@dataclass(frozen=True)
class Environment:
    gpu: str
    """Name of the GPU, or of the CPU used instead."""
    on_gpu: bool
    commit: str
    dtype: str
    roof_tflops: float
    roof_gbps: float
    clocks_before: str = ""
    clocks_after: str = ""
    torch_version: str = torch.__version__
    triton_version: str = triton.__version__


HEADER = (
    f"{'kernel':<12}{'size':<11}{'tokens':>8}  {'mode':<9}{'provider':<14}{'ms':>10}{'20 %':>10}{'80 %':>10}"
    f"{'TFLOP/s':>9}{'GB/s':>8}{'floor %':>9}{'peak MB':>9}{'x eager':>9}{'x compile':>10}{'error':>10}"
)


def line(row: Row, on_gpu: bool) -> str:
    """One row of the printed table; MB are 2^20 bytes, as in Liger's data."""
    peak = "-" if row.peak is None else f"{row.peak / 2**20:.0f}"
    eager, fast = ("-" if x is None else f"{x:.2f}" for x in (row.over_eager, row.over_compile))
    median, low, high = row.timing
    return (
        f"{row.kernel:<12}{row.size:<11}{row.tokens:>8}  {row.mode:<9}{row.provider:<14}{median:>10.4f}{low:>10.4f}"
        f"{high:>10.4f}{row.tflops:>9.3g}{row.gbps:>8.0f}{row.percent:>9.1f}{peak:>9}{eager:>9}{fast:>10}"
        f"{row.error:>10.1e}{'' if on_gpu else '  ' + NOT_A_GPU}"
    )


def records(rows: Iterable[Row], environment: Environment) -> list[dict[str, str]]:
    """CSV rows: one of metric `speed`, and one of `memory` if it was measured."""
    found = []
    try:
        liger = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        liger = ""
    for row in rows:
        extra = {"model": row.shape.model, "D": row.shape.width, "dtype": row.dtype, **row.details}
        common = {
            "kernel_name": row.kernel,
            "kernel_provider": row.provider,
            "kernel_operation_mode": "no-grad-forward" if row.mode == "no-grad" else row.mode,
            "x_name": "T",
            "x_label": "tokens",
            "x_value": row.tokens,
            "extra_benchmark_config_str": json.dumps(extra),
            "gpu_name": environment.gpu,
            "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
            "liger_version": liger,
            "flops": row.flops,
            "bytes": row.bytes,
            "error_vs_fp64": f"{row.error:.3e}",
            "config": row.config,
            "commit": environment.commit,
            "torch_version": environment.torch_version,
            "triton_version": environment.triton_version,
            "clocks": row.clocks,
        }
        rates = {"tflops": row.tflops, "gbps": row.gbps, "pct_of_measured_floor": row.percent}
        values = dict(zip(("y_value_50", "y_value_20", "y_value_80"), row.timing, strict=True))
        found.append({**common, "metric_name": "speed", "metric_unit": "ms", **values, **rates})
        if row.peak is not None:
            found.append(
                {**common, "metric_name": "memory", "metric_unit": "MB", **dict.fromkeys(values, row.peak / 2**20)}
            )
    return [{name: str(record.get(name, "")) for name in COLUMNS} for record in found]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier run or of Liger's own file, none if the file is missing; ValueError for any other file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = tuple(reader.fieldnames or ())
        if header not in (LIGER_COLUMNS, COLUMNS):
            raise ValueError(f"{path} does not have the columns of a benchmark: name another file")
        return [{name: row.get(name) or "" for name in COLUMNS} for row in reader]


def upsert(path: Path, found: list[dict[str, str]]) -> None:
    """Write `found` to `path`, replacing rows with the same key and appending the others."""
    merged = {tuple(row[name] for name in KEY): row for row in [*read_csv(path), *found]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    os.replace(draft, path)


def write_json(path: Path, rows: list[Row], environment: Environment) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            **asdict(row),
            "shape": row.shape._asdict(),
            "timing": row.timing._asdict(),
            "tflops": row.tflops,
            "gbps": row.gbps,
            "percent_of_floor": row.percent,
        }
        for row in rows
    ]
    note = "" if environment.on_gpu else NOT_A_GPU
    text = json.dumps({"note": note, "environment": asdict(environment), "rows": listed}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def best(rows: Iterable[Row]) -> list[Row]:
    """The fastest of our providers at every size, in mode `full`."""
    found: dict[tuple[str, Shape, int], Row] = {}
    for row in rows:
        key = row.kernel, row.shape, row.tokens
        if row.mode != "full" or row.baseline:
            continue
        if key not in found or row.timing.median < found[key].timing.median:
            found[key] = row
    return list(found.values())


def below(rows: Iterable[Row], percent: float) -> list[str]:
    """One line per size at which the fastest of our providers is below `percent` of the floor."""
    return [
        f"{row.kernel} {row.size} {row.tokens} tokens: {row.provider} reaches {row.percent:.1f} % of the floor,"
        f" {percent:g} % required"
        for row in best(rows)
        if row.percent < percent
    ]


class Verdict(NamedTuple):
    target: str
    measured: str
    holds: bool


OVER_EAGER = {3584: 1.3, 2048: 1.55}
LARGE = 16 * 1024
"""Number of tokens from which the targets apply."""


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Targets of the latent loss, for the fastest of our providers at every size; the worst size counts."""
    loss = [row for row in rows if row.kernel == "latent-loss" and row.mode == "full"]
    ours = best(loss)
    large = [row for row in ours if row.tokens >= LARGE and row.shape.width in OVER_EAGER]
    eager = {(row.shape, row.tokens): row.peak for row in loss if row.provider == "eager" and row.peak}
    found = []

    def judge(target: str, values: list[tuple[float, Row]], limit: float, unit: str, least: bool = True) -> None:
        if not values:
            return
        pick = min if least else max
        value, row = pick(values, key=lambda pair: pair[0])
        measured = f"{value:.3g}{unit} ({row.provider}, {row.size}, {row.tokens} tokens)"
        found.append(Verdict(target, measured, value >= limit if least else value <= limit))

    judge("at least 95 % of the floor from 16k tokens", [(row.percent, row) for row in large], 95, " %")
    with_compile = [(row.over_compile, row) for row in ours if row.over_compile is not None]
    judge("never slower than torch.compile", with_compile, 1, "x")
    for width, limit in OVER_EAGER.items():
        some = [(row.over_eager, row) for row in large if row.shape.width == width and row.over_eager is not None]
        judge(f"at least {limit:g}x eager at D={width} from 16k tokens", some, limit, "x")
    shares = [
        (row.peak / eager[row.shape, row.tokens], row)
        for row in large
        if row.peak is not None and (row.shape, row.tokens) in eager
    ]
    judge("peak memory at most a third of eager's from 16k tokens", shares, 1 / 3, "", least=False)
    return found


def verdict_table(found: list[Verdict]) -> str:
    lines = [f"{'target':<56}{'worst measured':<58}holds"]
    lines += [f"{v.target:<56}{v.measured:<58}{'yes' if v.holds else 'NO'}" for v in found]
    return "\n".join(lines)
