"""The topology: which ones are refused, and that of two real ranks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ranked
from bifrost.trainer.distributed.process_group import Ranks
from bifrost.trainer.distributed.topology import RankInfo, here, table, validate

GPU = "NVIDIA H100 80GB HBM3 GPU-{}"
EIGHT = [RankInfo(rank, f"gpu{rank // 4}", GPU.format(rank), "same") for rank in range(8)]


def test_a_valid_topology() -> None:
    assert validate(EIGHT) is None
    assert table(EIGHT) == [
        "ranks       0-3  gpu0  4 x NVIDIA H100 80GB HBM3",
        "ranks       4-7  gpu1  4 x NVIDIA H100 80GB HBM3",
    ]
    assert validate([replace(place, device="cpu") for place in EIGHT]) is None, "ranks share a CPU"


def test_a_gpu_is_named_by_its_model_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives the identity without the prefix that nvidia-smi writes."""
    uuid = "8a4f6b1e-0000-0000-0000-000000000001"
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    place = here(Ranks(0, 1, torch.device("cuda", 0)))
    assert place.device == GPU.format(uuid)
    (line,) = table([place])
    assert line.endswith("1 x NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("rank", "change", "problem"),
    [
        (5, {"rank": 4}, "rank 4 of gpu1 is at index 5 of the process group"),
        (5, {"device": EIGHT[6].device}, "ranks 5, 6 share one device of gpu1, NVIDIA H100"),
        (5, {"host": "gpu0"}, r"unequal numbers of ranks \(gpu0 5, gpu1 3\)"),
    ],
)
def test_an_invalid_topology_is_refused(rank: int, change: dict, problem: str) -> None:
    places = [replace(place, **change) if place.rank == rank else place for place in EIGHT]
    with pytest.raises(AssertionError, match=problem):
        assert not validate(places), validate(places)


def on_two_hosts(other_software: bool) -> list[str]:
    """The table of this rank's run, each rank on a host of its own."""
    import os

    from bifrost.slurm import software
    from bifrost.trainer.distributed import topology
    from bifrost.trainer.distributed.process_group import join
    from bifrost.trainer.errors import RunError

    os.environ["SLURMD_NODENAME"] = f"host{os.environ['RANK']}"
    if other_software and os.environ["RANK"] == "1":
        versions = {**software.all_versions(), "torch": "1.0"}
        software.all_versions = topology.all_versions = lambda: versions
    try:
        return topology.check_ranks(join())
    except RunError as error:
        return [str(error)]


@pytest.mark.multi
def test_two_ranks_agree() -> None:
    ended = ranked.run(on_two_hosts, 2, False)
    assert [rank.value for rank in ended] == [
        ["ranks         0  host0  1 x cpu", "ranks         1  host1  1 x cpu"]
    ] * 2


@pytest.mark.multi
def test_other_software_is_named() -> None:
    ended = ranked.run(on_two_hosts, 2, True)
    assert ended[0].value == ended[1].value
    (problem,) = ended[0].value
    assert problem.startswith("host0 and host1 have different software: torch ") and " and 1.0;" in problem
