"""KEY.json: the ground truth of every scene of a dataset, by its sample's key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..retry import call
from .drawings import NUMBER, Look
from .grammar import Object, Scene
from .heldout import CATEGORY_NAMES
from .places import PLACES

KEY = "KEY.json"


def to_json(scenes: Mapping[str, Scene]) -> str:
    """One line per scene; places as (row, column) of 3 x 3."""
    lines = []
    for key, scene in scenes.items():
        objects = [
            {"thing": look.thing, "colour": look.colour, "row": row, "column": column}
            for look, (row, column) in scene.objects
        ]
        lines.append(f"{json.dumps(key)}: {json.dumps({**scene._asdict(), 'objects': objects}, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_key(path: Path) -> dict[str, Scene]:
    """The scenes by key; raises DataError for a file that is not a key, or names drawings or places unknown here."""
    try:
        text = call(lambda: path.read_text(encoding="utf-8"), path)
        return {key: _scene(found) for key, found in json.loads(text).items()}
    except DataError:  # a storage error
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # The repr of a UnicodeDecodeError holds the whole file.
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else repr(error)
        raise DataError(
            f"{path}: not the ground truth of scenes ({reason}); give the {KEY} that `bifrost data demo OUT` wrote"
            " next to the shards"
        ) from error


def _scene(found: dict[str, Any]) -> Scene:
    objects = tuple(
        Object(Look(each["thing"], each["colour"]), (each["row"], each["column"])) for each in found["objects"]
    )
    if not objects or found["category"] not in CATEGORY_NAMES:
        raise ValueError(f"{len(objects)} objects in the category {found['category']}")
    for look, place in objects:
        if look not in NUMBER or place not in PLACES:
            raise ValueError(f"unknown object: {look} at {place}")
    return Scene(found["category"], str(found["caption"]), objects, found["phrasing"])
