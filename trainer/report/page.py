"""Report of a run: one self-contained HTML page of everything in its folder."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel

from ...data.units import counted, format_seconds
from ...recipes import Recipe
from ...slurm.exclusions import EXCLUDED
from ...slurm.exit_record import STOPPED
from ...slurm.exit_record import attempts as slurm_attempts
from ..io import flat, read_json
from ..monitors.renames import previews
from . import sources
from .drawing import COLOURS, Chart, Curve, Points, chart, noisy
from .files import RunFiles
from .series import Series
from .summary import PART, SHOWN, TROUBLE
from .timeline import KINDS, Attempt, intervals

SHEETS, WIDEST = 3, 1400
"""Number of newest contact sheets shown, and their maximum width in pixels."""


def page(run: RunFiles, now: float | None = None) -> str:
    """The page as HTML."""
    now = time.time() if now is None else now
    found = run.metrics.attempts.found
    sections = {
        "run": run,
        "state": run.state(now),
        "made": moment(now),
        "tiles": tiles(run),
        "charts": charts(run),
        "sources": sources.rows(run.metrics),
        "strip": strip(run, found),
        "goodput": _goodput(run),
        "attempts": _attempts(found),
        "jobs": _jobs(run.folder),
        "trouble": _trouble(run),
        "counts": Counter({kind: count for kind, count in run.metrics.counts.items() if kind in TROUBLE}),
        "checkpoints": _checkpoints(run),
        "images": _images(previews(run.folder)),
        "slowest": _slowest(run),
        "excluded": _excluded(run.folder),
        "stopped": (read_json(run.folder / STOPPED) or {}).get("reason"),
        "settings": _settings(run.recipe),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100) if run.recipe else "",
        "environment": [[key, value] for key, value in flat(run.environment) if key != "hosts"],
        "kernels": [[name, each.get("provider"), each.get("reason")] for name, each in _objects(run.kernels)],
    }
    return template("page").render(sections)


def template(name: str) -> Any:
    """A template, with the filters that all templates use."""
    environment = Environment(
        loader=PackageLoader(__package__ or "", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=format_seconds, text=_text, zip=zip)
    return environment.get_template(f"{name}.html.jinja")


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The most important figures, shown first."""
    last = run.metrics.last
    if last is None:
        return []
    wanted = run.recipe.get("steps")
    found = [("step", f"{last['step']:,}" + (f" of {wanted:,}" if isinstance(wanted, int) else ""))]
    if loss := run.metrics.curves.get("loss", Series()).smoothed():
        found.append(("loss, smoothed", f"{loss[-1][1]:.4g}"))
    known = {
        "samples_per_s": ("samples/s", "{:.4g}"),
        "mfu": ("MFU", "{:.1%}"),
        "tflops_per_device": ("TFLOP/s per device", "{:.3g}"),
        "peak_memory_gib": ("peak memory", "{:.3g} GiB"),
        "memory_headroom_gib": ("headroom", "{:.3g} GiB"),
        "skipped_steps": ("steps skipped", "{:,}"),
    }
    found += [
        (name, form.format(last[key])) for key, (name, form) in known.items() if isinstance(last.get(key), (int, float))
    ]
    if run.goodput:  # up to the last record, like the section on goodput, not of the last line
        found.append(("effective training time", f"{run.goodput['ettr']:.1%}"))
    return found


def charts(run: RunFiles) -> list[Chart]:
    """The charts for which the run has numbers."""
    metrics = run.metrics

    def curve(key: str) -> Series:
        return metrics.curves.get(key, Series())

    def column(key: str) -> Points:
        return curve(key).drawn()

    drawn = [
        chart(
            "loss",
            [
                *noisy("loss", curve("loss"), COLOURS[0]),
                *(
                    Curve(key.removeprefix(PART).replace("_", " "), curve(key).smoothed(), colour)
                    for key, colour in zip(metrics.parts, COLOURS[1:], strict=False)
                ),
            ],
            "Smoothed over a twentieth of the lines; faint: as logged.",
            falls=True,
        ),
        sources.loss_chart(metrics),
        sources.base_chart(metrics),
        chart(
            "held-out loss",
            [
                Curve("live weights", column("val_loss"), COLOURS[0]),
                Curve("averaged weights", column("val_loss_ema"), COLOURS[1]),
            ],
            "Mean over mask rates or noise levels, on samples that training never reads.",
        ),
        chart("samples per second", noisy("samples/s", curve("samples_per_s"), COLOURS[0]), zero=True),
        chart(
            "memory, GiB",
            [
                Curve("peak", column("peak_memory_gib"), COLOURS[1]),
                Curve("headroom", column("memory_headroom_gib"), COLOURS[2]),
            ],
            zero=True,
        ),
        chart("learning rate", [Curve("learning rate", column("lr"), COLOURS[0])], zero=True),
        chart("gradient norm", noisy("before clipping", curve("grad_norm"), COLOURS[0]), falls=True),
        chart(
            "utilisation, %",
            [
                Curve(key.upper(), [(x, 100 * y) for x, y in column(key)], colour)
                for key, colour in (("mfu", COLOURS[0]), ("hfu", COLOURS[5]))
            ],
            zero=True,
        ),
        chart("useful TFLOP/s per device", noisy("TFLOP/s", curve("tflops_per_device"), COLOURS[0]), zero=True),
        chart("waiting for data, % of the step", noisy("rank 0", metrics.waiting, COLOURS[0]), zero=True),
        chart(
            "rank work, s per step",
            [
                Curve("most", column("rank_work_s_max"), COLOURS[1]),
                Curve("median", column("rank_work_s_median"), COLOURS[0]),
            ],
            zero=True,
        ),
        chart(
            "weights gathered, GB/s per device",
            [Curve("over the step", column("allgather_gb_per_s"), COLOURS[0])],
            zero=True,
        ),
        chart("allocator retries", [Curve("since the attempt began", column("alloc_retries"), COLOURS[1])], zero=True),
    ]
    return [each for each in drawn if each is not None]


def strip(run: RunFiles, found: list[Attempt]) -> dict[str, Any] | None:
    """The timeline: intervals as shares of its width with a colour and a tooltip, and a tick per checkpoint."""
    spans = intervals(found)
    if not spans:
        return None
    first, last = spans[0].begin, spans[-1].end
    whole = max(last - first, 1e-9)
    bars = []
    for span in spans:
        colour, label = KINDS[span.kind]
        seconds = span.end - span.begin
        title = f"{label}: {format_seconds(seconds)} from {moment(span.begin)}"
        bars.append(((span.begin - first) / whole, seconds / whole, colour, title))
    ticks = [(when - first) / whole for _, when in run.metrics.checkpoints.drawn()]
    legend = [(text, colour) for kind, (colour, text) in KINDS.items() if kind in {span.kind for span in spans}]
    return {"bars": bars, "ticks": ticks, "legend": legend, "begin": moment(first), "end": moment(last)}


def moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _goodput(run: RunFiles) -> dict[str, Any] | None:
    """Seconds and share of each kind, and a bar of them."""
    found = run.goodput
    if found is None:
        return None
    begin, bars, rows = 0.0, [], []
    whole = max(found["wall_s"], sum(found["seconds"].values()))
    for kind, seconds in found["seconds"].items():
        colour, label = KINDS[kind]
        share = f"{seconds / found['wall_s']:.1%}"
        bars.append((begin / whole, seconds / whole, colour, f"{label}: {share}"))
        rows.append((colour, label, format_seconds(seconds), share))
        begin += seconds
    return {**found, "bars": bars, "rows": rows}


def _attempts(found: list[Attempt]) -> list[list[Any]]:
    rows = []
    for number, attempt in enumerate(found, 1):
        lost = f"{counted(attempt.lost_steps, 'step')}, {format_seconds(attempt.lost_s)}" if attempt.lost_steps else ""
        down = format_seconds(attempt.ready - (found[number - 2].seen if number > 1 else attempt.begin))
        span = f"{attempt.step:,} to {attempt.reached:,}"
        worked = format_seconds(max(0.0, attempt.seen - attempt.ready))
        outcome = attempt.outcome or ("not recorded" if number < len(found) else "none yet")
        rows.append([number, moment(attempt.begin), attempt.ranks, span, down, worked, lost, outcome])
    return rows


def _jobs(folder: Path) -> list[list[Any]]:
    """The attempts as recorded by Slurm's batch script."""
    keys = "hosts", "code", "decision", "reason"
    shown = slurm_attempts(folder)[-SHOWN:]
    return [[each.get("attempt"), moment(each["time"]), *map(each.get, keys)] for each in shown]


def _trouble(run: RunFiles) -> list[list[str]]:
    """Trouble events, newest last: time, step, event, details."""
    rows = []
    for event in run.metrics.newest["trouble"]:
        known = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
        rows.append(
            [moment(event["time"]), f"{event.get('step', ''):,}", event["event"], _text_of(event["event"], known)]
        )
    return rows


def _text_of(kind: str, known: dict[str, Any]) -> str:
    if kind == "skipped_step":
        numbers = ", ".join(f"{key} {_text(known.get(key))}" for key in ("loss", "grad_norm"))
        return f"{known.get('reason')} ({numbers})"
    if kind == "rollback":
        first, last = known.get("skipped_batches") or ("?", "?")
        return f"back to step {known.get('to')}, global batches {first} to {last} skipped"
    if kind == "bad_samples":
        samples = known.get("samples") or []
        listed = "; ".join(f"{key}: {reason}" for key, reason in samples[:3])
        return f"{counted(len(samples), 'sample')}: {listed}" + (" …" if len(samples) > 3 else "")
    return ", ".join(f"{key} {_text(value)}" for key, value in known.items())


def _checkpoints(run: RunFiles) -> list[list[Any]]:
    """Saves, newest last, and whether each is still on disk."""
    rows = []
    for event in run.metrics.newest["checkpoint"]:
        kept = (run.folder / "checkpoints" / f"step-{event['step']:08d}" / "manifest.json").is_file()
        size, seconds = event.get("bytes"), event.get("seconds", 0.0)
        rows.append(
            [
                f"{event['step']:,}",
                moment(event["time"]),
                f"{seconds:.1f} s",
                f"{event.get('blocked_s', seconds):.1f} s",
                f"{size / 2**30:.3g} GiB" if size else "",
                "kept" if kept else "",
            ]
        )
    return rows


def _images(folder: Path) -> list[tuple[str, Markup]]:
    """(name, data URL) of the newest contact sheets, newest first."""
    found = []
    for file in sorted(folder.glob("step-*.png"), reverse=True):
        if len(found) == SHEETS:
            break
        try:
            with Image.open(file) as image:
                image.thumbnail((WIDEST, 4 * WIDEST))
                data = io.BytesIO()
                image.convert("RGB").save(data, "webp", quality=85)
        except OSError:  # being written, or truncated
            continue
        found.append((file.stem, Markup("data:image/webp;base64," + base64.b64encode(data.getvalue()).decode())))
    return found


def _slowest(run: RunFiles) -> list[list[Any]]:
    """(rank, fraction of log lines on which it had the most work) of the slowest ranks."""
    counts = run.metrics.slowest
    return [[rank, f"{count / counts.total():.0%}"] for rank, count in counts.most_common(8)]


def _excluded(folder: Path) -> list[list[Any]]:
    return [
        [node, entry.get("times"), moment(entry.get("last", 0)), entry.get("reason")]
        for node, entry in _objects(read_json(folder / EXCLUDED) or {})
    ]


def _settings(recipe: dict[str, Any]) -> list[list[Any]]:
    """Settings that differ from their default: key, value, default."""
    usual = dict(flat(_defaults(Recipe)))
    return [[key, value, usual.get(key)] for key, value in flat(recipe) if value != usual.get(key)]


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Defaults as a recipe would state them; None for required values."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            value = _defaults(field.annotation)
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _objects(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, each) for name, each in found.items() if isinstance(each, dict)]


def _text(value: Any) -> str:
    """A setting or a number, as displayed."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
