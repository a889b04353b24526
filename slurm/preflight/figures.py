"""What a GPU of a known kind should reach, by the vendor's figures that the planner keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "trainer" / "planner" / "devices.yaml"
"""Data alone: nothing of the trainer is imported here."""


@dataclass(frozen=True)
class Figures:
    """One kind of GPU; peaks as its vendor states them."""

    name: str
    bf16_tflops: float
    hbm_gbs: float
    """GB/s of its memory."""
    intra_gbs: float
    """GB/s in one direction to the other GPUs of its node, over NVLink."""
    inter_gbs: float
    """GB/s in one direction to other nodes."""


def figures_of(device: str) -> Figures | None:
    """The figures of a GPU by the name that its driver gives; None for one that is not known, a MIG instance too."""
    for known in yaml.safe_load(FILE.read_text(encoding="utf-8"))["devices"].values():
        if device in known.get("names", ()) and "bf16_tflops" in known:
            peaks = (known[key] for key in ("bf16_tflops", "hbm_gbs", "intra_gbs", "inter_gbs"))
            return Figures(device, *map(float, peaks))
    return None
