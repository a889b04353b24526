"""Measurements of a stage-2 step as a record and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .machine import format_machine


@dataclass
class Result:
    """Measurements of a step, ours and the baseline's: seconds and bytes per step."""

    ours_s: float
    baseline_s: float
    ratio: float
    ours_samples_s: float
    baseline_samples_s: float
    ours_activation_bytes: int
    baseline_activation_bytes: int
    baseline_copied_bytes: int
    """Of these, bf16 copies of the ControlNet's weights, which autocast keeps; at most."""
    activation_ratio: float
    loss_error: float
    gradient_error: float
    ours_parts_s: dict[str, float]
    """Seconds of each part of the step: encoders if they run, forward, backward."""
    baseline_parts_s: dict[str, float]


def table(record: dict[str, Any], result: Result) -> str:
    (double, single), (copied, copied_single) = record["layers"], record["controlnet"]
    mib = " / ".join(f"{x / 2**20:,.0f}" for x in (result.ours_activation_bytes, result.baseline_activation_bytes))
    lines = [
        f"{record['recipe']}: FLUX of {double} double and {single} single blocks, width {record['width']},"
        f" {record['heads']} heads; ControlNet of {copied} and {copied_single}, {record['patches']} patch latents of"
        f" width {record['latent_width']}; {record['image_tokens']} image and {record['text_tokens']} text tokens;"
        f" {record['samples']} samples per step, {record['precision']},"
        f" checkpointing {'on' if record['activation_checkpointing'] else 'off'}",
        f"{format_machine(record['machine'])}; {record['threads']} threads, {record['date']}; median of"
        f" {record['rounds']} rounds in alternation; baseline: {record['baseline']}",
        "",
        f"{'ours':>11} {'baseline':>11} {'ratio':>6} {'activations, MiB':>19} {'ratio':>6} {'largest error':>13}",
        f"{result.ours_samples_s:>9.2f}/s {result.baseline_samples_s:>9.2f}/s {result.ratio:>6.2f} {mib:>19}"
        f" {result.activation_ratio:>6.2f} {max(result.loss_error, result.gradient_error):>13.1e}",
        "",
        "of the baseline's activations, copies of weights made by autocast: up to"
        f" {result.baseline_copied_bytes / 2**20:,.0f} MiB",
        "seconds per step:",
    ]
    for name, parts in (("ours", result.ours_parts_s), ("baseline", result.baseline_parts_s)):
        lines.append(f"{name:>11} " + ", ".join(f"{part} {spent:.3f}" for part, spent in parts.items()))
    return "\n".join(lines)
