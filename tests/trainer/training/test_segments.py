"""Which segments a run has after attempts with other sources, weights, names and places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost.data import open_sources, write_shard
from bifrost.recipes import load_recipe
from bifrost.recipes.data import Data
from bifrost.trainer.errors import RunError
from bifrost.trainer.training.mixture import (
    Segments,
    continued,
    data_of,
    from_json,
    mixed_plan,
    new_segments,
    stored_segments,
    to_json,
    until,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources a, b, c with 2, 3 and 4 samples."""
    for count, name in enumerate("abc", 2):
        samples = [(f"{name}{number}", {"png": b"image", "txt": b"x"}) for number in range(count)]
        write_shard(tmp_path / name / "s.tar", samples)
    return tmp_path


def settings(folder: Path, **weights: float | None) -> Data:
    """`data.sources` by name; the shards of `x_a` are those of a."""
    listed = [{"name": n, "shards": f"{folder}/{n[-1]}/s.tar", "weight": weight} for n, weight in weights.items()]
    return load_recipe("tiny-mllm", ["data.shards=null", f"data.sources={json.dumps(listed)}"]).data


def after(earlier: Segments, batch: int, data: Data) -> Segments:
    assert data.sources
    dataset = open_sources([(source.name, source.shards) for source in data.sources])
    found = continued(earlier, data, dataset, batch, "run")
    mixed_plan(found, dataset, data, 4, 0).locate(np.array([4 * batch]))
    return found


def described(segments: Segments) -> list[tuple[int, dict[str, tuple[int, int]]]]:
    return [(s.batch, {str(x.name): (x.number, x.weight) for x in s.sources}) for s in segments]


def test_numbers_are_those_of_the_first_use(folder: Path) -> None:
    first = after((), 0, settings(folder, b=0.5, a=0.25))
    second = after(first, 3, settings(folder, c=1, a=1))
    third = after(second, 7, settings(folder, a=3, b=2, c=1))
    assert described(third) == [
        (0, {"b": (0, 2), "a": (1, 1)}),
        (3, {"c": (2, 1), "a": (1, 1)}),
        (7, {"a": (1, 3), "b": (0, 2), "c": (2, 1)}),
    ]
    assert from_json(json.loads(json.dumps(to_json(third)))) == third
    assert [len(until(third, batch)) for batch in (0, 2, 3, 6, 7, 99)] == [1, 1, 2, 2, 3, 3]
    assert new_segments(third, {"mixture": to_json(second)}) == third[-1:]
    assert new_segments(third, {"mixture": to_json(third)}) == ()
    assert new_segments(first, None) == first and new_segments((), None) == ()


def test_without_weights_the_share_follows_the_samples(folder: Path) -> None:
    assert described(after((), 0, settings(folder, a=None, c=None))) == [(0, {"a": (0, 1), "c": (1, 2)})]


def test_the_same_ratio_in_another_order_is_no_change(folder: Path) -> None:
    first = after((), 0, settings(folder, a=1, b=3))
    assert described(after(first, 5, settings(folder, b=6, a=2))) == [(0, {"b": (1, 3), "a": (0, 1)})]


def test_one_that_was_never_trained_on_is_replaced(folder: Path) -> None:
    first = after((), 0, settings(folder, a=1))
    assert described(after(first, 0, settings(folder, b=1)))[0][0] == 0
    assert len(after(after(first, 4, settings(folder, b=1)), 4, settings(folder, c=1))) == 2


def test_renamed_and_moved_sources_continue_and_earlier_steps_are_found(folder: Path) -> None:
    first = after((), 0, settings(folder, a=1, b=1))
    second = after(first, 2, settings(folder, a=1, b=2))
    shutil.move(folder / "a", folder / "elsewhere")
    moved = settings(folder, new_a=1, b=2)
    assert moved.sources
    place = f"{folder}/elsewhere/s.tar"
    moved = moved.model_copy(
        update={"sources": [moved.sources[0].model_copy(update={"shards": place}), moved.sources[1]]}
    )
    third = after(second, 4, moved)
    assert described(third) == [(0, {"a": (0, 1), "b": (1, 1)}), (2, {"new_a": (0, 1), "b": (1, 2)})]
    assert data_of(third[0], moved).named == [place, f"{folder}/b/s.tar"]


def test_another_use_of_captions_is_a_change_and_earlier_steps_keep_theirs(folder: Path) -> None:
    def using(**changed: Any) -> Data:
        data = settings(folder, a=1, b=3)
        assert data.sources
        return data.model_copy(update={"sources": [data.sources[0].model_copy(update=changed), data.sources[1]]})

    first = after((), 0, using())
    assert after(first, 2, using(caption_dropout=None)) == first
    second = after(first, 2, using(caption_dropout=0.5))
    third = after(second, 4, using(caption_dropout=0.5, captions={"txt": 2.0}))
    assert [segment.batch for segment in third] == [0, 2, 4]
    assert new_segments(third, {"mixture": to_json(second)}) == third[2:]
    assert str(third[1]) == "a 25 % (caption_dropout 0.5), b 75 %"
    assert third[2].described()[0] | {"samples": 0} == {
        "name": "a",
        "samples": 0,
        "share": 0.25,
        "captions": {"txt": 2.0},
        "caption_dropout": 0.5,
    }
    assert from_json(json.loads(json.dumps(to_json(third)))) == third
    used = [[(s.captions, s.caption_dropout) for s in data_of(each, using()).sources or ()] for each in third]
    assert used == [[(None, None)] * 2, [(None, 0.5), (None, None)], [({"txt": 2.0}, 0.5), (None, None)]]
    everywhere = using().model_copy(update={"captions": {"txt": 1.0}})
    assert [source.captions for source in after((), 0, everywhere)[0].sources] == [{"txt": 1.0}] * 2

    def older(segments: Segments) -> list[dict[str, Any]]:
        stored = to_json(segments)
        for source in stored[0]["sources"]:
            del source["captions"], source["caption_dropout"]
        return stored

    assert from_json(older(first)) == first, "as stored before captions could be chosen"


def test_a_run_on_shards_continues_its_data_set_as_a_source(folder: Path) -> None:
    alone = settings(folder, b=1)
    fingerprint = after((), 0, alone)[0].sources[0].fingerprint
    state: dict[str, Any] = {"data": fingerprint, "recipe": {"data": {"shards": "as/it/was.tar"}}}
    found = after(stored_segments(state), 6, settings(folder, a=1, b=1))
    assert described(found) == [(0, {"None": (0, 1)}), (6, {"a": (1, 1), "b": (0, 1)})]
    assert new_segments(found, state) == found[-1:]
    shards = data_of(found[0], alone)
    assert shards.sources is None and shards.shards == f"{folder}/b/s.tar", "where they are now"
    assert described(after(stored_segments(state), 6, alone)) == [(0, {"None": (0, 1)}), (6, {"b": (0, 1)})]


def test_a_known_name_with_other_content_is_refused(folder: Path) -> None:
    first = after((), 0, settings(folder, a=1, b=1))
    shutil.copy(folder / "c/s.tar", folder / "a/s.tar")
    shutil.copy(folder / "c/s.index.jsonl", folder / "a/s.index.jsonl")
    with pytest.raises(RunError, match="run: the shards of the source a were others in this run"):
        after(first, 3, settings(folder, a=1, b=1))


def test_signatures_are_not_stored(folder: Path) -> None:
    (segment,) = after((), 0, settings(folder, a=1))
    signed = segment.sources[0].__class__(**{**vars(segment.sources[0]), "shards": "https://x/s.tar?Signature=abc"})
    assert "abc" not in json.dumps(to_json((segment.__class__(0, (signed,)),)))
