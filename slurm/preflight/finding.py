"""What the checks produce, and the bounds that they apply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ...recipes import explain
from ..errors import SlurmError


class Limits(BaseModel):
    """Bounds of preflight; a site sets its own."""

    model_config = ConfigDict(extra="forbid")

    free_gib: float = 10
    """Free space that the run's folder needs."""
    scratch_gib: float = 1
    """Free space that each scratch folder needs."""
    inodes: int = 10_000
    """Free inodes of the run's folder and of each scratch folder."""
    idle_gib: float = 2
    """GPU memory that others may hold."""
    clock_s: float = 1
    """How far a node's clock may be from the others'."""
    slow: float = 1 / 3
    """A node's best bandwidth to any other, as a part of the other nodes' median, below which it is bad."""
    pair_share: float = 0.05
    """The same as a part of the port's bandwidth, of GPUs that devices.yaml knows: below it every node is slow."""
    product_share: float = 0.4
    """A GPU's bf16 product, as a part of the peak of those that devices.yaml knows, below which its node is bad."""
    copy_share: float = 0.5
    """A copy in a GPU's memory, as a part of the memory's bandwidth of those that devices.yaml knows."""
    gpu_slow: float = 0.75
    """A GPU's product or copy, as a part of the median of all, below which its node is bad."""
    rounds: int = 32
    """Rounds of pairs at the most; N nodes need N - 1 for every pair."""
    node_s: float = 60
    """Seconds for the checks that a node makes by itself."""
    meet_s: float = 180
    """Seconds for every rank to report, from its own start."""
    grace_s: float = 10
    """Seconds for a node to come to where another one is."""
    shared_s: float = 30
    """Seconds until a file that one node wrote is seen by all."""
    fabric_s: float = 120
    """Seconds for the pairs and the all-reduce."""


@dataclass(frozen=True)
class Finding:
    """One check on one node."""

    check: str
    figure: str = ""
    """What was measured."""
    reason: str = ""
    """Why it is bad; empty when it is fine."""
    own: bool = False
    """A fault of the machine itself, also where no other node can be compared with."""
    silent: bool = False
    """The reason is that nothing was heard of the node, and not what it said."""
    same: bool = False
    """The figure must be equal on all nodes."""


def read_limits(settings: Mapping[str, float]) -> Limits:
    """A site's own bounds; SlurmError for an unknown name."""
    try:
        return Limits.model_validate(settings)
    except ValidationError as error:
        raise SlurmError(f"site file: preflight_limits.{explain(error, Limits)}") from error


def within(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether `work` ended in time; otherwise it goes on in a thread that dies with the process."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
