"""The topology: host, device and software of every rank. An invalid one is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...slurm.rank_env import UNBIND, host_name
from ...slurm.software import all_versions, fingerprint
from ..errors import RunError
from .process_group import Ranks


@dataclass(frozen=True)
class RankInfo:
    """Host, device and software of a rank, as it reads them itself."""

    rank: int
    host: str
    device: str
    """Name and, for a GPU, its UUID."""
    software: str
    """Hash of Python's version, every installed distribution's, and this package's source."""


def check_ranks(ranks: Ranks) -> list[str]:
    """The topology, one line per host; RunError on all ranks when it is invalid.

    A collective: every rank calls it, before any other.
    """
    places = _gather(ranks, here(ranks))
    if problem := validate(places):
        raise RunError(problem)
    if len({place.software for place in places}) > 1:
        raise RunError(_difference(places, _gather(ranks, all_versions())))
    return table(places)


def here(ranks: Ranks) -> RankInfo:
    """The RankInfo of this rank."""
    device = "cpu"
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        device = f"{properties.name} GPU-{properties.uuid}"  # as nvidia-smi writes it
    return RankInfo(ranks.rank, host_name(), device, fingerprint())


def validate(places: Sequence[RankInfo]) -> str | None:
    """What is wrong with the topology, in one line, or None."""
    for index, place in enumerate(places):
        if place.rank != index:
            return (
                f"rank {place.rank} of {place.host} is at index {index} of the process group: start the ranks with srun"
                " or with torchrun, not both"
            )
    for (host, device), count in Counter((place.host, place.device) for place in places).items():
        if count > 1 and device != "cpu":
            shared = [str(place.rank) for place in places if (place.host, place.device) == (host, device)]
            return f"ranks {', '.join(shared)} share one device of {host}, {device}: {UNBIND}"
    counts = Counter(place.host for place in places)
    if len(set(counts.values())) > 1:
        uneven = ", ".join(f"{host} {count}" for host, count in counts.items())
        return f"hosts have unequal numbers of ranks ({uneven}): give --ntasks-per-node"
    return None


def table(places: Sequence[RankInfo]) -> list[str]:
    """One line per host: its ranks and their devices."""
    lines = []
    for host in dict.fromkeys(place.host for place in places):
        mine = [place for place in places if place.host == host]
        devices = Counter(place.device.split(" GPU-")[0] for place in mine)
        numbers = f"{mine[0].rank}-{mine[-1].rank}" if len(mine) > 1 else str(mine[0].rank)
        lines.append(f"ranks {numbers:>9}  {host}  {', '.join(f'{n} x {name}' for name, n in devices.items())}")
    return lines


def _gather(ranks: Ranks, value: object) -> list:
    """Like `ranks.gather`, without NCCL, which would fail on a shared device before we can name it."""
    if ranks.device.type == "cpu" or ranks.size == 1:
        return ranks.gather(value)
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    values: list = [None] * ranks.size
    dist.all_gather_object(values, value, group=group)
    dist.destroy_process_group(group)
    return values


def _difference(places: Sequence[RankInfo], versions: Sequence[dict[str, str]]) -> str:
    other = next(index for index, place in enumerate(places) if place.software != places[0].software)
    names = sorted(versions[0].keys() | versions[other].keys())
    different = [name for name in names if versions[0].get(name) != versions[other].get(name)]
    shown = (
        ", ".join(f"{n} {versions[0].get(n, 'none')} and {versions[other].get(n, 'none')}" for n in different[:3])
        or "this package's own source"
    )
    return f"{places[0].host} and {places[other].host} have different software: {shown}; install the same on all nodes"
