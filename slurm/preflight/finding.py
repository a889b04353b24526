"""Findings of the checks, and the limits that they apply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...recipes import explain
from ..errors import SlurmError


class Limits(BaseModel):
    """Limits of preflight; a site may override them."""

    model_config = ConfigDict(extra="forbid")

    free_gib: float = 10
    """Minimum free space of the run folder."""
    scratch_gib: float = 1
    """Minimum free space of each scratch folder."""
    inodes: int = 10_000
    """Minimum free inodes of the run folder and of each scratch folder."""
    idle_gib: float = 2
    """GPU memory that may be in use before the job."""
    clock_s: float = 1
    """Maximum clock offset between a node and the others."""
    slow: float = 1 / 3
    """A node is bad if its best bandwidth to any other is below this fraction of the other nodes' median."""
    pair_share: float = 0.05
    """Minimum of the same as a fraction of the port's bandwidth, for GPUs in devices.yaml: catches all nodes slow."""
    product_share: float = 0.4
    """Minimum bf16 matrix product of a GPU, as a fraction of its peak in devices.yaml."""
    copy_share: float = 0.5
    """Minimum memory copy of a GPU, as a fraction of its bandwidth in devices.yaml."""
    gpu_slow: float = 0.75
    """Minimum product or copy of a GPU, as a fraction of the median of all GPUs."""
    rounds: int = 32
    """Maximum rounds of pairs; N nodes need N - 1 for every pair."""
    node_s: float = 60
    """Seconds for the checks of each node alone."""
    meet_s: float = 180
    """Seconds for every rank to report, counted from its own start."""
    grace_s: float = 10
    """Seconds by which nodes may differ in progress."""
    shared_s: float = 30
    """Seconds until a file written on one node is visible on all."""
    fabric_s: float = 120
    """Seconds for the pairs and the all-reduce."""


@dataclass(frozen=True)
class Finding:
    """One check on one node."""

    check: str
    figure: str = ""
    """The measured value."""
    reason: str = ""
    """Why it is bad; empty if it passes."""
    own: bool = False
    """A fault of the machine itself, also without other nodes to compare with."""
    silent: bool = False
    """The node did not report; `reason` is not from the node itself."""
    same: bool = False
    """The figure must be equal on all nodes."""


def read_limits(settings: Mapping[str, float]) -> Limits:
    """Limits with a site's overrides. Raises SlurmError for an unknown name."""
    try:
        return Limits.model_validate(settings)
    except ValidationError as error:
        raise SlurmError(f"site file: preflight_limits.{explain(error, Limits)}") from error


def within(seconds: float, work: Callable[[], Any]) -> bool:
    """Run `work` in a daemon thread; return whether it ended in time. Otherwise it continues in the background."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
