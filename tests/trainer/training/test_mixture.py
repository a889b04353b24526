"""Runs on several sources: the same sequence on any number of ranks, through kills, and through changes of the mix."""

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ranked
import runs
from bifrost.data import Dataset, open_dataset

pytestmark = [pytest.mark.multi, pytest.mark.slow]

A, B, C = "train-0000[01].tar", "train-00002.tar", "train-00003.tar"


def sources(shards: Path, **weighted: tuple[str, float | dict[int, float]]) -> list[str]:
    """The override for sources by name: shards and weight, or a schedule of weights."""
    listed = [{"name": n, "shards": str(shards / each), "weight": w} for n, (each, w) in weighted.items()]
    return ["data.shards=null", f"data.sources={json.dumps(listed)}"]


def train(shards: Path, runs_dir: Path, ranks: int, *overrides: str) -> list[ranked.Rank]:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, *overrides))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return ended


def keys_of(dataset: Dataset) -> set[str]:
    return {dataset.entry(*dataset.place(number))[0] for number in range(len(dataset))}


def per_source(line: dict[str, Any], metric: str) -> dict[str, float]:
    prefix = f"source_{metric}_"
    return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}


def test_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """One rank, and 2 -> 1 -> 4 -> 2 ranks: the same samples, masks and losses, of the run and of every source."""
    mix = sources(shards, a=(A, 2), b=(B, 1), c=(C, 1))
    train(shards, tmp_path / "whole", 1, "steps=12", *mix)
    for ranks, steps in ((2, 3), (1, 6), (4, 9), (2, 12)):
        workers = f"data.workers={ranks % 2}"
        train(shards, tmp_path / "parts", ranks, f"steps={steps}", workers, *mix)
    whole, parts = tmp_path / "whole/tiny-mllm", tmp_path / "parts/tiny-mllm"
    np.testing.assert_allclose(runs.losses(parts), runs.losses(whole), rtol=0, atol=1e-5)
    for line, same in zip(runs.steps(parts), runs.steps(whole), strict=True):
        assert line["data_digest"] == same["data_digest"]
        assert per_source(line, "samples") == per_source(same, "samples")
        assert per_source(line, "loss") == pytest.approx(per_source(same, "loss"), abs=1e-5)
    last = runs.steps(whole)[-1]
    assert per_source(last, "samples") == {"a": 48, "b": 24, "c": 24}, "exactly 2 : 1 : 1"
    assert per_source(last, "epochs") == {"a": 48 / 30, "b": 24 / 15, "c": 24 / 15}
    assert per_source(last, "bad_fraction") == {"a": 0, "b": 0, "c": 0}

    found = runs.replay(parts, "--step=12")
    own = {name: keys_of(open_dataset(str(shards / each))) for name, each in (("a", A), ("b", B), ("c", C))}
    assert all(sample["key"] in own[sample["source"]] for sample in found["samples"])
    assert Counter(sample["source"] for sample in found["samples"]) == {"a": 4, "b": 2, "c": 2}
    by_source = {name: [s["loss"] for s in found["samples"] if s["source"] == name] for name in own}
    if found["weights_exact"]:
        means = {name: float(np.mean(losses)) for name, losses in by_source.items()}
        assert per_source(last, "loss") == pytest.approx(means, abs=1e-5)
    (event,) = runs.events(parts, "mixture")
    assert [(each["name"], each["share"]) for each in event["sources"]] == [("a", 0.5), ("b", 0.25), ("c", 0.25)]


def test_scheduled_weights(shards: Path, tmp_path: Path) -> None:
    """b joins at global batch 4 and a ends at 8, as if three runs had followed one another: on one rank, and on 2 -> 1
    ranks with a stop within a segment."""
    a, b = {0: 1, 4: 3, 8: 0}, {0: 0, 4: 1}
    mix = sources(shards, a=(A, a), b=(B, b))
    train(shards, tmp_path / "whole", 1, "steps=10", *mix)
    ended = train(shards, tmp_path / "parts", 2, "steps=6", *mix)
    announced = [line.split(" on: ")[1] for line in ended[0].out.splitlines() if "from global batch" in line]
    assert announced == ["a 100 %", "a 75 %, b 25 %", "b 100 %"]
    train(shards, tmp_path / "parts", 1, "steps=10", "data.workers=1", *mix)
    by_hand = tmp_path / "by-hand"
    for steps, weighted in ((4, {"a": (A, 1)}), (8, {"a": (A, 3), "b": (B, 1)}), (10, {"b": (B, 1)})):
        train(shards, by_hand, 1, f"steps={steps}", *sources(shards, **weighted))
    whole, parts, hand = (tmp_path / each / "tiny-mllm" for each in ("whole", "parts", "by-hand"))
    digests = [[line["data_digest"] for line in runs.steps(run)] for run in (whole, parts, hand)]
    assert digests[0] == digests[1] == digests[2] and len(digests[0]) == 10
    assert per_source(runs.steps(parts)[-1], "samples") == {"a": 32 + 24, "b": 8 + 16}
    events = runs.events(parts, "mixture")
    assert [event["batch"] for event in events] == [0, 4, 8], "a resume within the schedule changes nothing"
    assert "data.sources" not in str(runs.events(parts, "settings_changed"))
    for step, wanted in ((3, {"a": 8}), (5, {"a": 6, "b": 2}), (9, {"b": 8})):
        found = runs.replay(parts, f"--step={step}")
        assert found["data_digest"] == digests[0][step - 1]
        assert Counter(sample["source"] for sample in found["samples"]) == wanted


def test_a_schedule_may_change_at_a_resume(shards: Path, tmp_path: Path) -> None:
    """What was scheduled from there on is forgotten."""
    run = tmp_path / "tiny-mllm"
    train(shards, tmp_path, 1, "steps=3", *sources(shards, a=(A, {0: 1, 5: 3}), b=(B, 1)))
    train(shards, tmp_path, 2, "steps=8", *sources(shards, a=(A, {0: 1, 6: 0}), b=(B, 1)))
    events = runs.events(run, "mixture")
    assert [(event["step"], event["batch"]) for event in events] == [(0, 0), (0, 5), (3, 6)]
    assert per_source(runs.steps(run)[-1], "samples") == {"a": 24, "b": 24 + 16}
    assert [segment["batch"] for segment in json.loads((run / "mixture.json").read_text())["segments"]] == [0, 6]


def test_kill_and_resume(shards: Path, tmp_path: Path) -> None:
    settings = ("steps=8", "checkpoint.every=3", "data.workers=1", *sources(shards, a=(A, 3), b=(B, 1)))
    train(shards, tmp_path / "whole", 2, *settings)
    arguments = runs.arguments(shards, tmp_path / "killed", *settings)
    ended = ranked.run(runs.train_until_killed, 2, arguments, 6)
    assert -signal.SIGKILL in [rank.code for rank in ended]
    train(shards, tmp_path / "killed", 2, *settings)
    whole, killed = (runs.steps(tmp_path / each / "tiny-mllm") for each in ("whole", "killed"))
    exact = ("step", "loss", "data_digest", "source_samples_a", "source_samples_b", "source_loss_a", "source_loss_b")
    assert [[line[key] for key in exact] for line in killed] == [[line[key] for key in exact] for line in whole]
    run = tmp_path / "killed/tiny-mllm"
    assert [start["step"] for start in runs.events(run, "start")] == [0, 3]
    assert len(runs.events(run, "mixture")) == 1, "a resume without a change is none"


def test_a_change_is_an_event_and_what_came_before_stays(shards: Path, tmp_path: Path) -> None:
    """Shards alone, then two sources with other weights, then without the first: at known positions."""
    run = tmp_path / "tiny-mllm"
    settings = ("log_every=1", "checkpoint.every=2")
    whole = tmp_path / "whole"
    train(shards, whole, 1, "steps=4", f"data.shards={shards / A}")
    train(shards, tmp_path, 2, "steps=4", f"data.shards={shards / A}", *settings)
    ended = train(shards, tmp_path, 1, "steps=6", *settings, *sources(shards, first=(A, 1), more=(B, 3)))
    assert "sources from global batch 5 on: first 25 %, more 75 %" in ended[0].out
    train(shards, tmp_path, 2, "steps=8", *settings, *sources(shards, more=(B, 1), late=(C, 1)))

    lines = runs.steps(run)
    before = [line["data_digest"] for line in runs.steps(whole / "tiny-mllm")]
    assert [line["data_digest"] for line in lines[:4]] == before
    events = runs.events(run, "mixture")
    assert [(event["step"], event["batch"]) for event in events] == [(4, 4), (6, 6)]
    assert [each["name"] for each in events[1]["sources"]] == ["more", "late"]
    assert per_source(lines[5], "samples") == {"first": 32 + 4, "more": 12}, "the first source keeps its count"
    assert per_source(lines[7], "samples") == {"more": 12 + 8, "late": 8}
    for step, expected in ((3, None), (5, {"first": 2, "more": 6}), (7, {"more": 4, "late": 4})):
        found = runs.replay(run, f"--step={step}")
        assert found["data_digest"] == lines[step - 1]["data_digest"]
        assert Counter(s["source"] for s in found["samples"] if "source" in s) == (expected or {})
        assert not found["weights_exact"] or found["loss"] == pytest.approx(lines[step - 1]["loss"], abs=1e-5)

    # An epoch of `more` has 15 samples: its second one begins only when the first is through.
    seen = [s for step in (5, 6, 7, 8) for s in runs.replay(run, f"--step={step}")["samples"] if s["source"] == "more"]
    assert [sample["epoch"] for sample in seen].count(0) == 15
    assert len({sample["key"] for sample in seen if sample["epoch"] == 0}) == 15

    changed = [{"name": "more", "shards": str(shards / C)}]
    arguments = runs.arguments(shards, tmp_path, "steps=9", "data.shards=null", f"data.sources={json.dumps(changed)}")
    (ended,) = ranked.bifrost(1, *arguments)
    assert ended.code == 2 and "the shards of the source more were others in this run" in ended.err
    (ended,) = ranked.bifrost(1, *runs.arguments(shards, tmp_path, "steps=9"))
    assert ended.code == 2 and "was trained with data.sources" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
