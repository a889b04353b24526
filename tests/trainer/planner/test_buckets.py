"""A plan of aspect-ratio buckets: FLOPs of every shape as torch counts them, memory of the largest, shares of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import plain
import ranked
import shaped_shards
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.planner import parts
from bifrost.trainer.planner.timing import useful_flops

KINDS = ("mm", "addmm", "convolution", "_convolution")
BUCKETS = "data.buckets={ratios: [1x1, 3x2, 2x3]}"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return shaped_shards.save(tmp_path_factory.mktemp("shapes"))


def settings(shapes: Path, *more: str) -> list[str]:
    small = ["precision=fp32", "global_batch=4", "micro_batch=4", "data.workers=0", "data.shuffle_window=2"]
    return [*small, f"data.shards={shapes}/train-*.tar", *more]


def test_flops_of_every_shape_are_torchs_own(shapes: Path) -> None:
    counted_as_planned(load_recipe("tiny-controlnet", settings(shapes, BUCKETS, "steps=9")))


@pytest.mark.parametrize("positions", ["learned", "interleaved"])
def test_flops_of_every_shape_of_stage_1_are_torchs_own(shapes: Path, positions: str) -> None:
    counted_as_planned(load_recipe("tiny-mllm", settings(shapes, BUCKETS, "steps=9", f"branch.positions={positions}")))


def counted_as_planned(recipe: Recipe) -> None:
    """Matrix products and convolutions of the forward pass, as test_flops.py counts them for squares."""
    inputs, model = plain.loaded(recipe)
    seen = set()
    for step, batch in enumerate(plain.batches(recipe, inputs)):
        bucket = inputs.plan.bucket(step)
        if bucket in seen:
            continue
        seen.add(bucket)
        with FlopCounterMode(display=False) as counter:
            model(**batch.arrays, normalizer=1.0)
        flops = counter.get_flop_counts()["Global"]
        found = sum(n for operator, n in flops.items() if str(operator).split(".")[1] in KINDS)
        text = sum(batch.arrays["text_lengths"]) / 4 if recipe.stage == "patch-latents" else 80
        planned = parts(recipe, text, shares=[float(number == bucket) for number in range(3)])
        assert found == pytest.approx(4 * sum(part.linear for part in planned), rel=0.002)
    assert seen == {0, 1, 2}


def test_a_plan_has_the_mean_of_the_flops_and_the_most_bytes() -> None:
    alone = [
        parts(load_recipe("flux-controlnet", [f"data.buckets={{ratios: [{each}]}}"])) for each in ("1x1", "3x2", "16x9")
    ]
    assert alone[0] == parts(load_recipe("flux-controlnet", [])), "a square without buckets"
    recipe = load_recipe("flux-controlnet", ["data.buckets={ratios: [1x1, 3x2, 16x9]}"])
    found = parts(recipe, shares=[0.5, 0.25, 0.25])
    mean = 0.5 * useful_flops(alone[0]) + 0.25 * useful_flops(alone[1]) + 0.25 * useful_flops(alone[2])
    assert useful_flops(found) == pytest.approx(mean)
    for place, part in enumerate(found):
        assert (part.kept, part.in_use) == (alone[1][place].kept, alone[1][place].in_use), "13 x 20 patches are most"


@pytest.mark.parametrize(
    ("recipe", "names", "tokens"),
    [
        ("tiny-controlnet", ["64x64", "80x48", "48x80"], [[8, 8], [6, 10], [10, 6]]),
        ("tiny-mllm", ["112x112", "140x84", "84x140"], [None] * 3),
    ],
)
def test_the_command_shows_the_shares_of_the_data(shapes: Path, recipe: str, names: list[str], tokens: list) -> None:
    given = settings(shapes, BUCKETS)
    (ended,) = ranked.bifrost(1, "plan", recipe, *given, "--gpus", "1", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["buckets"]
    # Of 52 images every fifth is a square, and another fifth 70 x 64; one of the squares is too small.
    shares = {each["shape"]: round(51 * each["share"]) for each in found}
    assert shares == dict(zip(names, (20, 21, 10), strict=True))
    assert [each["latents"] for each in found] == [[4, 4], [3, 5], [5, 3]]
    assert [each.get("tokens") for each in found] == tokens
    assert [each["largest"] for each in found] == [True, False, False]


def test_shares_are_equal_where_shards_cannot_be_read() -> None:
    (ended,) = ranked.bifrost(1, "plan", "tiny-controlnet", BUCKETS, "data.shards=none.tar", "--gpus", "1")
    assert ended.code == 0
    assert "shares of the buckets are not known, and taken as equal: none.tar: no such shard" in ended.err + ended.out
