"""Vendor figures of known GPU models, from the planner's devices.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "trainer" / "planner" / "devices.yaml"
"""Only a data file: nothing of the trainer is imported here."""


@dataclass(frozen=True)
class Figures:
    """One GPU model; peaks as stated by its vendor."""

    name: str
    bf16_tflops: float
    hbm_gbs: float
    """Memory bandwidth in GB/s."""
    intra_gbs: float
    """GB/s per direction to the other GPUs of its node, over NVLink."""
    inter_gbs: float
    """GB/s per direction to other nodes."""


def figures_of(device: str) -> Figures | None:
    """Figures of a GPU by its driver's name for it; None for an unknown one or a MIG instance."""
    for known in yaml.safe_load(FILE.read_text(encoding="utf-8"))["devices"].values():
        if device in known.get("names", ()) and "bf16_tflops" in known:
            peaks = (known[key] for key in ("bf16_tflops", "hbm_gbs", "intra_gbs", "inter_gbs"))
            return Figures(device, *map(float, peaks))
    return None
