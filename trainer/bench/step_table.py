"""What a step's cases measured, as a record and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .machine import told


@dataclass
class Row:
    """What a case measured; seconds a step, bytes, FLOPs a sample."""

    text_tokens: str
    mean_text_tokens: float
    padded_text_tokens: int
    routed_s: float
    rival_s: float
    ratio: float
    routed_samples_s: float
    rival_samples_s: float
    routed_activation_bytes: int
    rival_activation_bytes: int
    activation_ratio: float
    useful_flops: float
    routed_flops: float
    rival_flops: float
    flops_ratio: float
    loss_error: float
    gradient_error: float
    shares: dict[str, float]
    """Of the routed step with the tower: each part's share of the time."""
    mfu: float | None = None
    """Useful FLOPs over what the device could do; None where its peak is not known."""
    hfu: float | None = None
    rival_mfu: float | None = None
    rival_hfu: float | None = None


def table(record: dict[str, Any], rows: list[Row]) -> str:
    heads, groups = record["heads"]
    lines = [
        f"{record['recipe']}: {record['layers']} layers, width {record['width']}, MLP {record['mlp']}, {heads} heads in"
        f" {groups} groups, {record['patches']} patches; {record['samples']} samples a step, {record['precision']},"
        f" checkpointing {'on' if record['activation_checkpointing'] else 'off'}",
        f"{told(record['machine'])}; {record['threads']} threads, {record['date']}; median of {record['rounds']}"
        f" rounds, rivals in turns; the rival: {record['rival']}",
        "",
        f"{'text tokens':>14} {'routed':>11} {'rival':>11} {'ratio':>6} {'of FLOPs':>8} {'activations, MiB':>19}"
        f" {'ratio':>6} {'largest error':>13} {'MFU':>6} {'HFU':>6}",
    ]
    for row in rows:
        padded = f"{row.mean_text_tokens:.0f} in {row.padded_text_tokens}" if row.text_tokens == "real" else ""
        mib = f"{row.routed_activation_bytes / 2**20:,.0f} / {row.rival_activation_bytes / 2**20:,.0f}"
        shares = " ".join(f"{x:>6.1%}" if x is not None else f"{'-':>6}" for x in (row.mfu, row.hfu))
        lines.append(
            f"{padded or row.text_tokens:>14} {row.routed_samples_s:>9.2f}/s {row.rival_samples_s:>9.2f}/s"
            f" {row.ratio:>6.2f} {row.flops_ratio:>8.2f} {mib:>19} {row.activation_ratio:>6.2f}"
            f" {max(row.loss_error, row.gradient_error):>13.1e} {shares}"
        )
    lines += ["", "share of the routed step's time, with the vision tower:"]
    for row in rows:
        shares = ", ".join(f"{name} {spent:.1%}" for name, spent in row.shares.items())
        lines.append(f"{row.text_tokens:>14} {shares}")
    return "\n".join(lines)
