"""KEY.json: the ground truth of every scene of a dataset, by its sample's key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import DataError
from .drawings import Look
from .grammar import Object, Scene

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
    """The scenes by key; raises DataError for a file that is not a key."""
    try:
        return {
            key: Scene(
                found["category"],
                found["caption"],
                tuple(
                    Object(Look(each["thing"], each["colour"]), (each["row"], each["column"]))
                    for each in found["objects"]
                ),
                found["phrasing"],
            )
            for key, found in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no ground truth of scenes ({error!r}); make it with `bifrost data demo`") from error
