"""Write a new recipe for `bifrost init`: a shipped one in full, with a comment on every setting."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .fields import NAME
from .load import NO_NAME, RecipeError, find_recipe, load_recipe
from .schema import Recipe
from .section import is_group
from .yaml_dialect import Dumper, read_yaml

WIDTH = 100
OF_THE_OTHER_STAGE = {"patch-latents": {"flux", "controlnet"}, "controlnet": {"branch"}}
"""Stage -> groups of settings that it does not read."""
HEAD = """\
# Settings with a # right before them have the default shown; remove the # to change one.
# key.path=value on the command line overrides any of them: bifrost train {file} optimizer.lr=3e-4
"""


def template(source: str | Path, name: str, shards: str | None, file: str) -> str:
    """YAML of the recipe `source` with the name `name` and, if given, `shards`, to be saved as `file`.

    All other settings equal those of `source`. Raises RecipeError when `source` or `name` is invalid.
    """
    if not re.match(NAME, name):
        raise RecipeError(f"{name!r} {NO_NAME}")
    given = [f"name={json.dumps(name)}", *([f"data.shards={json.dumps(shards)}"] if shards else [])]
    recipe = load_recipe(source, given)
    head, notes = _comments(find_recipe(source))
    lines = [*head, "", *HEAD.format(file=file).splitlines(), ""]
    skipped = OF_THE_OTHER_STAGE[recipe.stage] - recipe.model_fields_set
    for key, field in Recipe.model_fields.items():
        if key not in skipped:
            gap = [""] if section_of(field) else []
            lines += [*gap, *(f"# {note}" for note in notes.get(key, [])), *_setting(recipe, key, field, "")]
    return "\n".join(lines) + "\n"


def _setting(section: BaseModel, key: str, field: FieldInfo, indent: str) -> Iterator[str]:
    """The lines of one setting or group of settings."""
    value, inner = getattr(section, key), section_of(field)
    given = key in section.model_fields_set
    if inner is None or (value is None and field.default is None and _needs_values(inner)):
        yield from _explained(field.description or (inner and inner.__doc__), indent)
        yield f"{indent}{'' if given else '#'}{key}: {yaml_line(value)}"
        return
    yield from _explained(field.description or inner.__doc__, indent)
    if given and value is not None:
        yield f"{indent}{key}:"
        for name, each in inner.model_fields.items():
            yield from _setting(value, name, each, indent + "  ")
    else:
        yield from _defaults(inner, key, indent)


def _needs_values(section: type[BaseModel]) -> bool:
    """Whether a group has settings without a default."""
    return any(field.is_required() for field in section.model_fields.values())


def _defaults(section: type[BaseModel], key: str, indent: str) -> Iterator[str]:
    """The lines of a group that the recipe leaves at its defaults."""
    yield f"{indent}#{key}:"
    for name, field in section.model_fields.items():
        if inner := section_of(field):
            yield from _defaults(inner, name, indent + "  ")
        else:
            yield from _explained(field.description, indent + "  ")
            value = field.get_default(call_default_factory=True)
            yield f"{indent}  #{name}: {'' if value is PydanticUndefined else yaml_line(value)}"


def _explained(text: str | None, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join((text or "").split()), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a group of settings, also of an optional one."""
    options = [field.annotation, *get_args(field.annotation)]
    return next(filter(is_group, options), None)


def yaml_line(value: Any) -> str:
    """A value as YAML in one line."""
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, list):
        value = [each.model_dump(mode="json") if isinstance(each, BaseModel) else each for each in value]
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _comments(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The leading comment of a recipe file, and by top-level key the comments above and at the end of its line,
    including those of the recipe that it `extends`."""
    text = path.read_text(encoding="utf-8")
    first, *_ = re.split(r"^(?=\w)", text, maxsplit=1, flags=re.M)
    head = [line for line in first.splitlines() if line.startswith("#")]
    notes: dict[str, list[str]] = {}
    above: list[str] = []
    for line in text[len(first) :].splitlines():
        if line.startswith("#"):
            above.append(line.removeprefix("#").strip())
        elif found := re.match(r"(\w+):", line):
            after = re.search(r"\s#\s+(.*)$", line)
            if kept := [*above, *([after[1]] if after else [])]:
                notes[found[1]] = kept
            above = []
    if base := read_yaml(text).get("extends"):
        sibling = path.parent / base
        notes = {**_comments(sibling if sibling.is_file() else find_recipe(base))[1], **notes}
    return head, notes
