"""Source images of editing pairs: KEY.source.jpg (or jpeg, png, webp), which KEY.txt turns into KEY.jpg."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from .index import IMAGE_TYPES

SOURCE_TYPES = tuple(f"source.{kind}" for kind in IMAGE_TYPES)
"""Extensions of the member that is the source image."""
SOURCE_IMAGE = "source image: "
"""Begins the reason why a sample's source image cannot be used."""
SourceImages = Literal["ignored", "used", "required"]
"""`used`: samples with a source image are editing pairs, others are not. `required`: those without are unreadable."""


def source_type(members: Container[str]) -> str | None:
    """The extension of a sample's source image; None when it has none."""
    return next((kind for kind in SOURCE_TYPES if kind in members), None)
