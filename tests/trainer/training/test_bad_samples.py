"""Damaged samples during training: replaced by a determined neighbour, reported by key, too many stop the run."""

import re
from pathlib import Path

import pytest

import ranked
import runs
from bifrost.data import write_shard
from bifrost.data.index import load_index

pytestmark = pytest.mark.multi


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """The shards with one image of each cut short, indexed as they are."""
    import webdataset

    folder = tmp_path / "damaged"
    for shard in sorted(shards.glob("*.tar")):
        samples = []
        for number, sample in enumerate(webdataset.WebDataset(str(shard), shardshuffle=False)):
            image = sample["png"][:60] if number == 3 else sample["png"]
            samples.append((sample["__key__"], {"png": image, "txt": sample["txt"]}))
        write_shard(folder / shard.name, samples)
        assert len(samples) == load_index(str(folder / shard.name)).header.samples
    return folder


def test_replaced_alike_on_any_number_of_ranks_and_reported(damaged: Path, tmp_path: Path) -> None:
    settings = ("steps=8", "data.max_bad_fraction=1.0")
    reports, digests = [], []
    for ranks in (1, 2):
        arguments = runs.arguments(damaged, tmp_path / str(ranks), *settings, f"data.workers={ranks - 1}")
        assert [rank.code for rank in ranked.bifrost(ranks, *arguments)] == [0] * ranks
        run = tmp_path / str(ranks) / "tiny-mllm"
        events = runs.events(run, "bad_samples")
        reports.append([(event["step"], sorted(key for key, _ in event["samples"])) for event in events])
        digests.append(runs.steps(run)[-1]["data_digest"])
    assert reports[0] == reports[1]
    assert digests[0] == digests[1]
    # One epoch is 7.5 steps: each damaged sample was met.
    assert {key for _, keys in reports[0] for key in keys} == {f"pattern-{n:03d}" for n in (3, 18, 33, 48)}


def test_too_many_stop_the_run_with_their_reason(damaged: Path, tmp_path: Path) -> None:
    ended = ranked.bifrost(2, *runs.arguments(damaged, tmp_path, "steps=40", "data.max_bad_fraction=0.02"))
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = ended[0].err.strip().splitlines()
    assert "above data.max_bad_fraction 0.02" in line and re.search(r" \d+ like pattern-0(03|18|33|48) \(", line)
    assert not ended[1].err
    assert runs.events(tmp_path / "tiny-mllm", "end")[-1]["outcome"] == "failed"
