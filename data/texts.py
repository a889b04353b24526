"""Samples of an understanding source: texts, or questions with their answers.

A question and its answer are those of KEY.json, `{"question": "…", "answer": "…"}`, or of another member whose
extension ends in json; other members are texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from .bucket_rule import Shape
from .errors import BadSample
from .samples import ReadableSamples
from .shards import RawSample
from .transforms import clean_caption

FIELDS = ("question", "answer")


class ReadableTexts(ReadableSamples):
    """`ReadableSamples` whose caption is a text, or the answer to a question about the image. Images of a source of
    texts are not read, and empty."""

    def _contents(self, raw: RawSample, shapes: Sequence[Shape]) -> dict[str, Any]:
        asks = raw.caption_member.rpartition(".")[2] == "json"
        texts = dict(zip(FIELDS, _question(raw), strict=True)) if asks else {"answer": raw.caption}
        images = super()._contents(raw, shapes) if raw.image else {"image": np.zeros((0, 0, 3), np.uint8)}
        return {**images, "caption": texts["answer"], "question": texts.get("question")}


def _question(raw: RawSample) -> tuple[str, str]:
    """Question and answer of a sample; BadSample when it lacks one."""
    try:
        described = json.loads(raw.caption)
        question, answer = (clean_caption(described[name]) for name in FIELDS)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise BadSample(raw.key, f"its .{raw.caption_member} has no text under {' and '.join(FIELDS)}") from None
    return question, answer
