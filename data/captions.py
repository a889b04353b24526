"""Extract captions from a table cell or JSON value: text, bytes, a list of them, or an object with a text field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import DataError

CAPTION_TYPE = "txt"
"""Extension of the member with a sample's caption, or its first one."""
CAPTION_COLUMNS = ("caption", "text")
"""Default names of the caption column."""


def further_members(columns: Sequence[str]) -> list[str]:
    """Extensions of the members with the captions of `columns` after the first: `Short text` -> `short_text.txt`.
    Raises DataError when two have the same one, or one is that of a further caption of a list."""
    found = [re.sub(r"[^a-z0-9_-]", "_", name.lower().removesuffix(".txt")) for name in columns[1:]]
    for name, column in zip(found, columns[1:], strict=True):
        if found.count(name) > 1 or re.fullmatch(r"\d+", name):
            raise DataError(
                f"--caption-column {column}: its captions would be in KEY.{name}.txt, as others; rename the column"
            )
    return [f"{name}.{CAPTION_TYPE}" for name in found]


def numbered(member: str, texts: Sequence[Any]) -> dict[str, Any]:
    """Members of several captions: `short.txt`, `short.2.txt`, …; of KEY.txt `txt`, `2.txt`, …"""
    stem = member.removesuffix(CAPTION_TYPE)
    return {f"{stem}{f'{number}.' if number > 1 else ''}{CAPTION_TYPE}": text for number, text in enumerate(texts, 1)}


def captions_of(value: Any) -> list[str | bytes]:
    """The captions in a value that are not blank. Raises ValueError with the reason when it has no place for text."""
    if value is None:
        return []
    if isinstance(value, str | bytes):
        return [value] if value.strip() else []
    if isinstance(value, list):
        return [text for each in value for text in captions_of(each)]
    if isinstance(value, dict):
        known = [name for name in CAPTION_COLUMNS if value.get(name) is not None]
        texts = [name for name, each in value.items() if isinstance(each, str)]
        name = known[0] if known else texts[0] if len(texts) == 1 else None
        if name is None:
            raise ValueError(
                f"the caption is an object without {' or '.join(CAPTION_COLUMNS)}: {', '.join(value) or 'it is empty'}"
            )
        return captions_of(value[name])
    raise ValueError(f"the caption is not text but {value!r:.40}")
