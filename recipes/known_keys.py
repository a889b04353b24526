"""The keys of settings, and which of them someone may have meant by an unknown one."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel

from .section import is_group

ELSEWHERE = {
    "ranks": "the number of processes is the option --ranks N",
    "gpus": "the number of processes is the option --ranks N",
    "batch_size": "did you mean global_batch (samples per step) or micro_batch (samples per rank and backward pass)?",
    "learning_rate": "did you mean optimizer.lr?",
    "epochs": "the length of a run is steps",
}
"""Names for a recipe's settings in other systems -> hint."""


def section(path: list[str], model: type[BaseModel]) -> type[BaseModel] | None:
    """The group of settings at `path`; None if there is none. A number in it is that of an item of a list."""
    found: type[BaseModel] | None = model
    for part, after in zip(path, [*path, ""][1:], strict=True):
        if part.isdigit():
            continue
        if found is None or part not in found.model_fields:
            return None
        annotation = found.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        if after.isdigit():
            options = [item for option in options for item in get_args(option)]
        found = next(filter(is_group, options), None)
    return found


def known_keys(model: type[BaseModel], at: tuple[str, ...] = ()) -> list[str]:
    """All dotted keys of `model`, those of groups included."""
    group = section(list(at), model)
    keys = []
    for name in group.model_fields if group else ():
        keys += [".".join([*at, name]), *known_keys(model, (*at, name))]
    return keys


def keys_named(name: str, model: type[BaseModel]) -> list[str]:
    """The key `name`, or else the keys that end in it, such as optimizer.lr for lr."""
    keys = known_keys(model)
    return [name] if name in keys else [key for key in keys if key.endswith(f".{name}")]


def suggestion(key: str, model: type[BaseModel]) -> str:
    """What may have been meant by the unknown dotted `key`."""
    *groups, name = key.split(".")
    if "stage" in model.model_fields and name in ELSEWHERE:
        return ELSEWHERE[name]
    group = section(groups, model)
    here = [".".join([*groups, each]) for each in (group.model_fields if group else ())]
    keys = known_keys(model)
    near = (
        keys_named(name, model)[:3]
        or difflib.get_close_matches(key, here, n=1, cutoff=0.8)
        or [each for each in here if each.startswith(f"{key}_")][:1]
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        or _near(name, here, 0.5 if groups else 0.65)
        or _near(name, keys, 0.75)
    )
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known here: {', '.join(each.rpartition('.')[2] for each in here)}"


def _near(name: str, keys: list[str], cutoff: float) -> list[str]:
    """The key with the last part most similar to `name`."""
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [last[one] for one in difflib.get_close_matches(name, last, n=1, cutoff=cutoff)]
