"""Shards of texts without images: indexed, verified, read, and refused where images are needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bifrost.data import BadSample, CaptionChoice, DataError, open_dataset, verify, write_shard
from bifrost.data.make_catalogue import make_catalogues
from bifrost.data.texts import ReadableTexts
from bifrost.data.write import index_all

SAMPLES = [
    {"txt": "one text", "json": json.dumps({"question": "what  is\nit?", "answer": "a\tcar", "more": 1})},
    {"txt": "another", "json": json.dumps({"question": "where?"})},
    {"txt": "a third", "json": "{"},
    {"json": json.dumps({"question": "who?", "answer": ["a", "b"]})},
    {"png": "not a text"},
    {"txt": "the last", "json": json.dumps({"question": "why?", "answer": "because"})},
]


@pytest.fixture
def texts(tmp_path) -> Path:
    samples = [(f"k{n}", {kind: text.encode() for kind, text in members.items()}) for n, members in enumerate(SAMPLES)]
    write_shard(tmp_path / "t" / "t-00000.tar", samples)
    found = index_all(str(tmp_path / "t"), texts=True)
    assert found.left_out == {"no text": 1} and not found.problems
    return tmp_path / "t"


def choice(member: str) -> CaptionChoice:
    return CaptionChoice({member: 1}, images="used")


@pytest.mark.parametrize("catalogued", [False, True])
def test_texts_are_read_and_verified(texts, catalogued) -> None:
    if catalogued:
        make_catalogues(str(texts))
    assert verify(str(texts)) == []
    dataset = open_dataset(str(texts), captions=choice("txt"))
    (header,) = dataset.headers
    assert (header.samples, header.captions, header.image_bytes, header.texts) == (5, 4, 0, True)
    assert [dataset.read(0, n).caption for n in (0, 1, 2, 4)] == ["one text", "another", "a third", "the last"]
    assert dataset.read(0, 0).image == b""
    with pytest.raises(BadSample, match="no caption"):
        dataset.read(0, 3)
    found = index_all(str(texts))
    assert len(found.done) == 1 and found.done[0][1].samples == 1, "as images again"


def test_questions_and_unreadable_ones(texts) -> None:
    """An unreadable one is replaced by the next question, with its reason."""
    reader, replaced = ReadableTexts(open_dataset(str(texts), captions=choice("json")), (8,)), []
    found = [reader.read(0, 0, n, n, replaced) for n in range(5)]
    assert [(item.question, item.caption) for item in found] == [
        ("what is it?", "a car"),
        *[("why?", "because")] * 4,
    ]
    assert replaced == [(f"k{n}", "its .json has no text under question and answer") for n in (1, 2, 3)]
    assert all(item.image.shape == (0, 0, 3) for item in found)


def test_images_next_to_questions(tmp_path, make_image) -> None:
    """They are read with questions, and ignored with texts, even if they are damaged."""
    asked = json.dumps({"question": "what?", "answer": "noise"}).encode()
    for n in range(2):
        image = make_image(n)[: 60 if n else None]
        write_shard(tmp_path / f"i-{n}.tar", [("k", {"png": image, "txt": b"text", "json": asked})])
    spec, replaced = str(tmp_path / "i-*.tar"), []
    reader = ReadableTexts(open_dataset(spec, captions=choice("json")), (8,))
    items = [reader.read(0, shard, 0, shard, replaced) for shard in range(2)]
    assert [item.image.shape for item in items] == [(8, 8, 3)] * 2 and [key for key, _ in replaced] == ["k"]
    np.testing.assert_array_equal(items[0].image, items[1].image)
    ignored = open_dataset(spec, captions=CaptionChoice({"txt": 1}, images="ignored"))
    assert [ReadableTexts(ignored, (8,)).read(0, shard, 0, shard, []).caption for shard in range(2)] == ["text"] * 2
    assert sum(size for _, size in ignored.spans(0, 0)) == 512 + len(b"text"), "a tar header and the text"


def test_a_training_on_texts_is_refused(texts, tmp_path, make_image) -> None:
    with pytest.raises(DataError, match=r"t-00000\.tar: indexed as texts, which only sources with task=understanding"):
        open_dataset(str(texts))
    write_shard(tmp_path / "s" / "s-00000.tar", [("k", {"png": make_image(0), "txt": b"x"})])
    dataset = open_dataset([str(tmp_path / "s"), str(texts)])
    with pytest.raises(DataError, match="indexed as texts"):
        dataset.read(1, 0)
