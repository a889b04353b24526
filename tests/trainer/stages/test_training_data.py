"""The choice of captions as training draws it, and dropped captions by source."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runs
from bifrost.data import Item, open_sources, write_shard
from bifrost.recipes import Recipe, load_recipe
from bifrost.trainer.errors import RunError
from bifrost.trainer.models.rng import Stream, chosen
from bifrost.trainer.stages import open_stage
from bifrost.trainer.stages.caption_dropout import CaptionDropout
from bifrost.trainer.stages.precompute import encode
from bifrost.trainer.stages.training_data import caption_choice, open_training_data

WEIGHTS = {"txt": 3.0, "short.txt": 1.0, "2.txt": 0.5}
DRAWS = 10_000


def chi_square(counts: list[int], shares: list[float]) -> float:
    expected = np.array(shares) / sum(shares) * sum(counts)
    return float(((np.array(counts) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_frequencies_follow_the_weights(seed: int) -> None:
    """Over samples in an epoch and over epochs of a sample; below the 99.9 % quantile of two degrees of freedom."""
    choice = caption_choice(WEIGHTS, seed)
    for order in ([(2, index) for index in range(DRAWS)], [(epoch, 7 << 40) for epoch in range(DRAWS)]):
        found = Counter(choice.among(WEIGHTS, *at) for at in order)
        assert chi_square([found[kind] for kind in WEIGHTS], list(WEIGHTS.values())) < 13.8


def test_draws_of_captions_are_independent_of_seeds_sources_and_dropped_captions() -> None:
    """Agreement of two choices, and of a choice with dropout, as often as chance gives it."""
    index = np.arange(DRAWS)
    equal = {"txt": 1.0, "short.txt": 1.0}

    def picked(seed: int, first: int = 0) -> np.ndarray:
        choice = caption_choice(equal, seed)
        return np.array([choice.among(equal, 0, first + number) == "txt" for number in range(DRAWS)])

    dropped = chosen(0, Stream.CAPTION_DROPOUT, np.zeros_like(index), index, 0.5)
    for other in (picked(1), picked(0, 1 << 40), dropped):
        agreeing = int((picked(0) == other).sum())
        assert chi_square([agreeing, DRAWS - agreeing], [1, 1]) < 10.8, "99.9 % quantile of one degree of freedom"


@pytest.fixture
def sets(tmp_path: Path) -> list[dict]:
    """Two sources of 200 samples with captions in KEY.txt and KEY.short.txt."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    for name in ("a", "b"):
        samples = [(f"{name}{n}", {"png": file.getvalue(), "txt": b"long", "short.txt": b"s"}) for n in range(200)]
        write_shard(tmp_path / name / "train-00000.tar", samples)
    return [{"name": name, "shards": f"{tmp_path}/{name}/train-*.tar"} for name in ("a", "b")]


def recipe(sources: list[dict], *more: str) -> Recipe:
    name, *overrides = runs.arguments(Path(), Path(), "data.shards=null", f"data.sources={sources}", *more)[1:]
    return load_recipe(name, overrides)


def test_a_source_has_its_own_dropout(sets: list[dict]) -> None:
    """Of the other source the same captions are dropped as without it."""
    data = recipe([sets[0], {**sets[1], "caption_dropout": 0.75}]).data
    dataset = open_sources([(each["name"], each["shards"]) for each in sets])
    pixels = np.zeros((1, 1, 3), np.uint8)
    items = [Item(0, shard << 40 | n, "k", pixels, "c", (), (shard, n)) for shard in range(2) for n in range(200)]
    dropped = CaptionDropout(0, 0.25, data, dataset)(items)
    usual = CaptionDropout(0, 0.25)(items)
    assert dropped[:200].tolist() == usual[:200].tolist()
    assert 30 < dropped[:200].sum() < 70 and 130 < dropped[200:].sum() < 170
    assert CaptionDropout(0, 1.0, recipe([{**sets[0], "caption_dropout": 0.0}]).data, dataset)(items[:200]).sum() == 0


def test_a_stage_drops_captions_by_source(sets: list[dict]) -> None:
    """Prompts of one length: of a source without captions, and of the other, with all of them."""
    given = [{**sets[0], "caption_dropout": 1.0}, {**sets[1], "caption_dropout": 0.0}]
    small = recipe(given, "branch.caption_dropout=0.5")
    stage, dataset = open_stage(small), open_training_data(small.data)
    pixels = np.zeros((small.data.image_size, small.data.image_size, 3), np.uint8)
    items = [Item(0, n, "k", pixels, "many words", (), (n % 2, n)) for n in range(32)]
    lengths = stage.collate(dataset)(items)["text_lengths"]
    assert len(set(lengths[::2])) == len(set(lengths[1::2])) == 1 and lengths[0] < lengths[1]


def test_sources_take_the_captions_of_data_unless_they_have_their_own(sets: list[dict]) -> None:
    data = recipe([sets[0], {**sets[1], "captions": {"txt": 1}}], "data.captions={short.txt: 1}").data
    dataset = open_training_data(data)
    assert [dataset.read(shard, 0).caption for shard in range(2)] == ["s", "long"]
    assert data.caption_members == {"txt", "short.txt"}


FLUX = ("flux.path=builtin:tiny-flux", "flux.placement.text=cached", "flux.placement.vae=cached")


def test_a_cache_of_texts_is_refused_with_a_choice(sets: list[dict]) -> None:
    """Its outputs are of KEY.txt. Caches of images are made for every sample with a usable caption."""
    base = runs.arguments(Path(), Path(), "data.captions={txt: 1, short.txt: 1}", *FLUX, recipe="tiny-controlnet")
    asked = load_recipe(base[1], [*base[2:], f"data.shards={sets[0]['shards']}"])
    outputs = open_stage(asked).outputs()
    assert [each.kind for each in outputs] == ["vae", "text"]
    for use in (lambda: encode(outputs, asked.data, None, 2), lambda: open_stage(asked).open_caches()):
        with pytest.raises(
            RunError, match=r"^flux\.placement\.text=cached: .* of KEY\.txt, but .*short\.txt, txt; leave"
        ):
            use()
