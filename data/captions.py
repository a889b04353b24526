"""Extract a caption from a table cell or JSON value: text, bytes, a list of them, or an object with a text field."""

from __future__ import annotations

from typing import Any

CAPTION_COLUMNS = ("caption", "text")
"""Default names of the caption column."""


def caption_of(value: Any) -> tuple[str | bytes, int]:
    """The caption in a value, and the number of further captions that are not used: of a list, the first is taken.

    Raises ValueError with the reason when there is no text.
    """
    if value is None:
        return "", 0
    if isinstance(value, str | bytes):
        return value, 0
    if isinstance(value, list):
        texts = [each for each in map(caption_of, value) if each[0].strip()]
        return (texts[0][0], sum(more for _, more in texts) + len(texts) - 1) if texts else ("", 0)
    if isinstance(value, dict):
        known = [name for name in CAPTION_COLUMNS if value.get(name) is not None]
        texts = [name for name, each in value.items() if isinstance(each, str)]
        name = known[0] if known else texts[0] if len(texts) == 1 else None
        if name is None:
            raise ValueError(
                f"the caption is an object without {' or '.join(CAPTION_COLUMNS)}: {', '.join(value) or 'it is empty'}"
            )
        return caption_of(value[name])
    raise ValueError(f"the caption is not text but {value!r:.40}")
