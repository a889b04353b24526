"""Measurements of a step as a record and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .machine import format_machine


@dataclass
class Row:
    """Measurements of a case: seconds per step, bytes, FLOPs per sample. The baseline's are None if it does not fit in
    memory."""

    text_tokens: str
    mean_text_tokens: float
    padded_text_tokens: int
    routed_s: float
    baseline_s: float | None
    ratio: float | None
    routed_samples_s: float
    baseline_samples_s: float | None
    routed_activation_bytes: int
    baseline_activation_bytes: int | None
    activation_ratio: float | None
    useful_flops: float
    routed_flops: float
    baseline_flops: float | None
    flops_ratio: float | None
    loss_error: float | None
    gradient_error: float | None
    shares: dict[str, float]
    """Each part's fraction of the routed step's time, including the vision encoder."""
    mfu: float | None = None
    """Useful FLOPs over the device's peak; None if its peak is unknown."""
    hfu: float | None = None
    baseline_mfu: float | None = None
    baseline_hfu: float | None = None


def table(record: dict[str, Any], rows: list[Row]) -> str:
    heads, groups = record["heads"]
    lines = [
        f"{record['recipe']}: {record['layers']} layers, width {record['width']}, MLP {record['mlp']}, {heads} heads in"
        f" {groups} groups, {record['patches']} patches; {record['samples']} samples per step, masks per sample:"
        f" {record['draws']}, vision encoder {record['vision_encoder']}, {record['precision']},"
        f" checkpointing {'on' if record['activation_checkpointing'] else 'off'}",
        f"{format_machine(record['machine'])}; {record['threads']} threads, {record['date']}; median of"
        f" {record['rounds']} rounds in alternation; baseline: {record['baseline']}",
        "",
        f"{'text tokens':>14} {'routed':>11} {'baseline':>11} {'ratio':>6} {'of FLOPs':>8} {'activations, MiB':>19}"
        f" {'ratio':>6} {'largest error':>13} {'MFU':>6} {'HFU':>6}",
    ]
    for row in rows:
        padded = f"{row.mean_text_tokens:.0f} in {row.padded_text_tokens}" if row.text_tokens == "real" else ""
        mib = " / ".join(
            _shown(x and x / 2**20, ",.0f") for x in (row.routed_activation_bytes, row.baseline_activation_bytes)
        )
        error = (
            None if row.loss_error is None or row.gradient_error is None else max(row.loss_error, row.gradient_error)
        )
        shares = " ".join(f"{_shown(x, '.1%'):>6}" for x in (row.mfu, row.hfu))
        lines.append(
            f"{padded or row.text_tokens:>14} {row.routed_samples_s:>9.2f}/s "
            f"{_shown(row.baseline_samples_s, '.2f'):>9}/s"
            f" {_shown(row.ratio, '.2f'):>6} {_shown(row.flops_ratio, '.2f'):>8} {mib:>19}"
            f" {_shown(row.activation_ratio, '.2f'):>6} {_shown(error, '.1e'):>13} {shares}"
        )
    lines += ["", "share of the routed step's time, with the vision encoder:"]
    for row in rows:
        shares = ", ".join(f"{name} {spent:.1%}" for name, spent in row.shares.items())
        lines.append(f"{row.text_tokens:>14} {shares}")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
