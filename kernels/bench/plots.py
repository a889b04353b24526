"""Plots of a benchmark: time and percentage of the floor over tokens, and all kernels under the measured roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import NOT_A_GPU, Environment, Row


def draw(rows: list[Row], environment: Environment, folder: Path) -> list[Path] | None:
    """Write `<kernel>.png` for every kernel and `roofline.png` to `folder`; None if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    where = environment.gpu if environment.on_gpu else f"{environment.gpu}: {NOT_A_GPU}"
    where += f"\ntorch {environment.torch_version}, Triton {environment.triton_version}, {environment.dtype}"
    written = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)

    for kernel in dict.fromkeys(row.kernel for row in rows):
        save(_by_tokens(Figure, [row for row in rows if row.kernel == kernel], kernel, where), f"{kernel}.png")
    save(_roofline(Figure, rows, environment, where), "roofline.png")
    return written


def _by_tokens(figure_class: Any, rows: list[Row], kernel: str, where: str) -> Any:
    """One row of panels per width; of mode `full` if that was measured."""
    mode = "full" if any(row.mode == "full" for row in rows) else rows[0].mode
    rows = [row for row in rows if row.mode == mode]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure = figure_class(figsize=(11, 4 * len(shapes)), layout="constrained")
    figure.suptitle(f"{kernel}, {mode}. {where}", fontsize=10)
    for axes, shape in zip(figure.subplots(len(shapes), 2, squeeze=False), shapes, strict=True):
        some = [row for row in rows if row.shape == shape]
        for provider in dict.fromkeys(row.provider for row in some):
            points = sorted((row.tokens, row) for row in some if row.provider == provider)
            x = [tokens for tokens, _ in points]
            style = {"marker": "o", "linestyle": "--" if points[0][1].baseline else "-", "label": provider}
            axes[0].plot(x, [row.timing.median for _, row in points], **style)
            axes[1].plot(x, [row.percent for _, row in points], **style)
        floor = sorted({(row.tokens, row.floor_ms) for row in some})
        axes[0].plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
        axes[1].axhline(100, color="black", linestyle=":")
        axes[0].set(title=f"D = {shape.width}", ylabel="ms", xscale="log", yscale="log", xlabel="tokens")
        axes[1].set(title=f"D = {shape.width}", ylabel="% of the measured floor", xscale="log", xlabel="tokens")
        axes[1].set_ylim(bottom=0)
        tokens = sorted({row.tokens for row in some})
        axes[0].legend(fontsize=8)
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.set_xticks(tokens, [f"{count // 1024}k" if count % 1024 == 0 else str(count) for count in tokens])
            axis.minorticks_off()
    return figure


def _roofline(figure_class: Any, rows: list[Row], environment: Environment, where: str) -> Any:
    """The fastest of our providers in every mode, or a baseline if there is none."""
    figure = figure_class(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    intensity = [row.flops / row.bytes for row in rows]
    ridge = environment.roof_tflops * 1e3 / environment.roof_gbps
    ends = min(*intensity, ridge) / 2, max(*intensity, ridge) * 2
    xs = [ends[0], ridge, ends[1]]
    axis.plot(xs, [min(x * environment.roof_gbps / 1e3, environment.roof_tflops) for x in xs], color="black")
    axis.annotate(f"copy {environment.roof_gbps:.0f} GB/s", (ends[0], ends[0] * environment.roof_gbps / 1e3))
    axis.annotate(f"GEMM {environment.roof_tflops:.3g} TFLOP/s", (ridge, environment.roof_tflops))
    for kernel in dict.fromkeys(row.kernel for row in rows):
        fastest: dict[tuple[Any, ...], Row] = {}
        for row in (row for row in rows if row.kernel == kernel):
            key = row.shape, row.tokens, row.mode
            rank = row.baseline, row.timing.median
            if key not in fastest or rank < (fastest[key].baseline, fastest[key].timing.median):
                fastest[key] = row
        found = list(fastest.values())
        axis.scatter([row.flops / row.bytes for row in found], [row.tflops for row in found], s=18, label=kernel)
    axis.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axis.set_title(f"Measured roofline of this run. {where}", fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
