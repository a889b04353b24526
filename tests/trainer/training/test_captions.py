"""Runs on several captions per sample: the same ones on any number of ranks, through kills, and what may change."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ranked
import runs
import small_shards
from bifrost.data import write_shard

pytestmark = [pytest.mark.multi, pytest.mark.slow]

CAPTIONS = "data.captions={txt: 2, short.txt: 1, long.txt: 1}"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Two folders of two shards with 60 samples; every third sample lacks the long caption."""
    folder = tmp_path_factory.mktemp("captioned")
    for shard in range(4):
        samples = []
        for number in range(shard * 15, shard * 15 + 15):
            texts = {"txt": f"txt of {number}", "short.txt": f"short.txt of {number}"}
            texts |= {"long.txt": f"long.txt of {number}" + " and so on" * 20} if number % 3 else {}
            image = {"png": small_shards.pattern(number)[: 80 if number == 31 else None]}
            samples.append((f"k{number:03d}", {**image, **{kind: text.encode() for kind, text in texts.items()}}))
        write_shard(folder / ("a" if shard < 2 else "b") / f"train-{shard:05d}.tar", samples)
    return folder


def train(shards: Path, runs_dir: Path, ranks: int, *overrides: str) -> list[ranked.Rank]:
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, "data.max_bad_fraction=0.5", *overrides))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return ended


def test_any_number_of_ranks_and_replay(captioned: Path, tmp_path: Path) -> None:
    """One rank, and 2 -> 1 -> 4 -> 2 ranks: the digest covers the captions, and losses follow from them."""
    train(captioned / "*", tmp_path / "whole", 1, "steps=8", CAPTIONS)
    for ranks, steps in ((2, 2), (1, 4), (4, 6), (2, 8)):
        train(captioned / "*", tmp_path / "parts", ranks, f"steps={steps}", f"data.workers={ranks % 2}", CAPTIONS)
    whole, parts = tmp_path / "whole/tiny-mllm", tmp_path / "parts/tiny-mllm"
    np.testing.assert_allclose(runs.losses(parts), runs.losses(whole), rtol=0, atol=1e-5)
    digests = [line["data_digest"] for line in runs.steps(whole)]
    assert [line["data_digest"] for line in runs.steps(parts)] == digests

    members = set()
    for step in (3, 8):
        found = runs.replay(parts, f"--step={step}")
        assert found["data_digest"] == digests[step - 1]
        for sample in found["samples"]:
            number, member = int(sample["key"][1:]), sample["caption_member"]
            assert sample["caption"].startswith(f"{member} of {number}")
            assert member != "long.txt" or number % 3
            members.add(member)
    assert members == {"txt", "short.txt", "long.txt"}


def test_kill_and_resume_to_the_bit_and_a_change_is_refused(captioned: Path, tmp_path: Path) -> None:
    settings = ("steps=8", "checkpoint.every=3", "data.workers=1", "data.max_bad_fraction=0.5", CAPTIONS)
    train(captioned / "*", tmp_path / "whole", 2, *settings)
    arguments = runs.arguments(captioned / "*", tmp_path / "killed", *settings)
    ended = ranked.run(runs.train_until_killed, 2, arguments, 6)
    assert -signal.SIGKILL in [rank.code for rank in ended]
    train(captioned / "*", tmp_path / "killed", 2, *settings)
    whole, killed = (runs.steps(tmp_path / each / "tiny-mllm") for each in ("whole", "killed"))
    exact = ("step", "loss", "data_digest")
    assert [[line[key] for key in exact] for line in killed] == [[line[key] for key in exact] for line in whole]
    for other, named in (("data.captions={txt: 2, short.txt: 1}", "long.txt was 1"), ("data.captions=null", "was {")):
        again = runs.arguments(captioned / "*", tmp_path / "killed", *settings, "steps=9", other)
        (refused,) = ranked.bifrost(1, *again)
        assert refused.code == 2 and "data.captions" in refused.err and named in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_the_captions_of_a_source_may_change_from_a_step_on(captioned: Path, tmp_path: Path) -> None:
    """A change is an event, and replay uses the captions and the dropout of the step's own segment."""

    def sources(**of_b: Any) -> list[str]:
        named = [{"name": name, "shards": f"{captioned}/{name}/*.tar", "weight": 1} for name in "ab"]
        return ["data.shards=null", f"data.sources={json.dumps([named[0], {**named[1], **of_b}])}"]

    settings = ("log_every=1", "checkpoint.every=2", "branch.caption_dropout=0")
    run = tmp_path / "tiny-mllm"
    train(captioned, tmp_path, 1, "steps=4", *settings, *sources(captions={"short.txt": 1}))
    ended = train(captioned, tmp_path, 2, "steps=8", *settings, *sources(captions={"txt": 1}, caption_dropout=1))
    assert 'from global batch 5 on: a 50 %, b 50 % (captions {"txt": 1.0}, caption_dropout 1.0)' in ended[0].out
    events = runs.events(run, "mixture")
    assert [(event["batch"], event["sources"][1].get("captions")) for event in events] == [
        (0, {"short.txt": 1.0}),
        (4, {"txt": 1.0}),
    ]
    lines = runs.steps(run)
    for step, member, dropped in ((4, "short.txt", False), (5, "txt", True), (8, "txt", True)):
        found = runs.replay(run, f"--step={step}")
        assert found["data_digest"] == lines[step - 1]["data_digest"]
        assert not found["weights_exact"] or found["loss"] == pytest.approx(lines[step - 1]["loss"], abs=1e-5)
        of = {name: [s for s in found["samples"] if s["source"] == name] for name in "ab"}
        assert {(s["caption_member"], s["caption_dropped"]) for s in of["a"]} == {("txt", False)}
        assert {(s["caption_member"], s["caption_dropped"]) for s in of["b"]} == {(member, dropped)}
