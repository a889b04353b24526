"""Captions of 600 tokens: read to their end when the limit allows it, and otherwise counted and reported."""

from pathlib import Path

import numpy as np
import pytest

import ranked
import runs
import small_shards
import tiny_flux
from bifrost.data import write_shard
from bifrost.recipes import load_recipe
from bifrost.trainer.models.hub import locate
from bifrost.trainer.models.prompt import PromptTemplate, load_tokenizer

pytestmark = [pytest.mark.multi, pytest.mark.slow]

LENGTH = 600
WHOLE, CUT = 700, 300


def caption(number: int, tail: str) -> str:
    """A caption of at least `LENGTH` tokens of which only the end depends on `tail`; every third one is short."""
    long = f"pattern {number} of many shades of" + " red" * LENGTH + tail
    return long if number % 3 else f"pattern number {number}"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> dict[str, Path]:
    """Shards that differ in the ends of their captions alone."""
    found = {}
    for tail in (" and a cat", " without a dog"):
        found[tail] = tmp_path_factory.mktemp("long")
        for shard in range(2):
            samples = []
            for number in range(shard * 16, shard * 16 + 16):
                text = caption(number, tail).encode()
                samples.append((f"k{number:03d}", {"png": small_shards.pattern(number), "txt": text}))
            write_shard(found[tail] / f"train-{shard:05d}.tar", samples)
    return found


def train(recipe: str, shards: Path, runs_dir: Path, ranks: int, *settings: str) -> tuple[Path, str]:
    """The run, with its output."""
    whole = (*runs.TINY, "steps=3", f"micro_batch={8 // ranks}", *settings)
    ended = ranked.bifrost(ranks, *runs.arguments(shards, runs_dir, *whole, recipe=recipe))
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].err
    return runs_dir / recipe, ended[0].out


def test_the_end_of_a_caption_is_read_if_the_limit_allows_it(captioned: dict[str, Path], tmp_path: Path) -> None:
    template = PromptTemplate(load_tokenizer(locate("builtin:tiny", None)), WHOLE)
    lengths = {tail: template.count_tokens(caption(1, tail)) for tail in captioned}
    assert all(LENGTH <= length <= WHOLE for length in lengths.values()), lengths
    losses: dict[tuple[int, str, int], list[float]] = {}
    for limit, all_ranks in ((WHOLE, (1, 2)), (CUT, (1, 2))):
        settings = (f"branch.max_text_tokens={limit}", "branch.caption_dropout=0")
        for number, (tail, shards) in enumerate(captioned.items()):
            for ranks in all_ranks if number == 0 else all_ranks[:1]:
                folder = tmp_path / f"{limit}-{number}-{ranks}"
                run, output = train("tiny-mllm", shards, folder, ranks, *settings)
                losses[limit, tail, ranks] = runs.losses(run)
                counted = [line["captions_truncated"] for line in runs.steps(run)]
                reported = runs.events(run, "captions_truncated")
                if limit == WHOLE:
                    assert counted == [0, 0, 0] and not reported and "captions are longer" not in output
                    continue
                members = runs.replay(run, "--step=1")["samples"]
                assert counted[0] == sum(len(sample["caption"]) > LENGTH for sample in members) > 0
                assert [(event["step"], event["captions"]) for event in reported] == [(1, counted[0])]
                assert output.count("captions are longer than 300 tokens of a prompt (branch.max_text_tokens)") == 1
    first, second = captioned
    for limit in (WHOLE, CUT):
        np.testing.assert_allclose(losses[limit, first, 2], losses[limit, first, 1], rtol=0, atol=1e-5)
    assert losses[CUT, second, 1] == losses[CUT, first, 1], "the ends are not read"
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses[WHOLE, second, 1], losses[WHOLE, first, 1], strict=True))


def test_ends_that_t5_does_not_read_are_counted(captioned: dict[str, Path], tmp_path: Path) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    plain = ("flux.caption_dropout=0", "flux.caption_exchange=0", "controlnet.norm=group")
    settings = (f"flux.path={flux}", *plain, "steps=2")
    losses = []
    for number, shards in enumerate(captioned.values()):
        run, output = train("tiny-controlnet", shards, tmp_path / str(number), 2, *settings)
        losses.append(runs.losses(run))
        members = runs.replay(run, "--step=1")["samples"]
        wanted = sum(len(sample["caption"]) > LENGTH for sample in members)
        assert runs.steps(run)[0]["captions_truncated"] == wanted > 0
        assert output.count("tokens of T5 (flux.text_tokens): their ends are not read") == 1
    assert losses[0] == losses[1]


def test_encoding_says_how_many_ends_are_lost(captioned: dict[str, Path], tmp_path: Path) -> None:
    flux = tiny_flux.save(tiny_flux.pipeline(), tmp_path / "flux")
    shards = next(iter(captioned.values()))
    arguments = runs.arguments(shards, tmp_path, f"flux.path={flux}", recipe="tiny-controlnet")[1:]
    (ended,) = ranked.bifrost(1, "data", "encode", *arguments, "flux.placement.text=cached")
    assert ended.code == 0, ended.err
    long = sum(number % 3 > 0 for number in range(32))
    assert f"32 samples in 2 shards, {long} captions longer than the text model reads: the ends are lost" in ended.out
    run, _ = train("tiny-controlnet", shards, tmp_path, 1, f"flux.path={flux}", "flux.placement.text=cached")
    assert all("captions_truncated" not in line for line in runs.steps(run)), "not known from a cache"


def test_planned_memory_follows_the_limit() -> None:
    """Keys and values of each of the branch's layers, concatenated for every pass, in bf16, per text token."""
    from bifrost.trainer.planner import parts, plan, workload

    def activations(limit: int) -> float:
        recipe = load_recipe("mllm-7b", [f"branch.max_text_tokens={limit}"])
        return plan(parts(recipe), workload(recipe), 8).memory.per_pass["activations"]

    layers, keys, samples = 28, 4 * 128, 16
    assert activations(600) - activations(300) == samples * layers * 2 * 2 * keys * 300
