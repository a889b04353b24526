"""Small files of a run: images written atomically, JSON read if it is complete; settings as dotted keys."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.atomic import write_atomic

if TYPE_CHECKING:
    from PIL import Image


def write_png(file: Path, image: Image.Image) -> None:
    """Write the image atomically. Raises OSError."""
    png = io.BytesIO()
    image.save(png, "PNG")
    write_atomic(file, png.getvalue())


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in `file`; None if there is no such file or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def flat(tree: Any, path: str = "", separator: str = ".") -> Iterator[tuple[str, Any]]:
    """Key and value of each leaf; the keys on its path are joined by `separator`."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from flat(value, f"{path}{separator}{key}" if path else str(key), separator)
    else:
        yield path, tree
