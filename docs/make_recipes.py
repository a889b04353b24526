"""Writes docs/recipes.md from the schema: `python docs/make_recipes.py`. A test fails when it is out of date."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bifrost.recipes import Recipe
from bifrost.recipes.section import is_group
from bifrost.recipes.template import section_of, yaml_line

HEAD = """\
# Recipes

<!-- Written by docs/make_recipes.py from recipes/schema.py. -->

A recipe is a YAML file of the settings below; `bifrost train` takes its path, or the name of a shipped one:
for stage 1 [tiny-mllm](../recipes/tiny-mllm.yaml), [mllm-3b](../recipes/mllm-3b.yaml) and
[mllm-7b](../recipes/mllm-7b.yaml), for stage 2 [tiny-controlnet](../recipes/tiny-controlnet.yaml) and
[flux-controlnet](../recipes/flux-controlnet.yaml). The large ones are for 8 to 64 GPUs; `mllm-3b-256`,
`mllm-7b-256` and `flux-controlnet-256` extend them to more, [mllm-7b-lora](stage1.md#fewer-trained-weights) and
[flux-controlnet-lora](stage2.md#fewer-trained-weights) to fewer: [their plans](plan.md#the-shipped-recipes-on-h200).

`key.path=value` on the command line overrides one setting and is read as YAML, so that lists, `null` and `3e-4` work;
what is not YAML, such as `*.tar`, is text. A key that is not below is refused with the nearest one, and a value of
another type is refused as well, such as `true` or `"7"` for a number. `~` at the beginning of a path is the home
folder; a path that begins with a variable, such as `$SCRATCH`, is refused.

A recipe with `extends: mllm-7b`, or with the path of another file relative to its folder, contains only the settings
that differ:

```yaml
extends: mllm-7b
name: mine
data: {shards: "/data/pairs/*.tar"}
optimizer: {lr: 5.0e-5}
```

`--dry-run` prints the recipe with every default filled in, DeepSpeed's configuration and the parameter counts. It reads
no shards and downloads nothing for the shipped models.

```sh
bifrost train tiny-mllm --dry-run optimizer.lr=3e-4 'optimizer.betas=[0.9, 0.99]' ema=null
```

`global_batch` = ranks x `micro_batch` x backward passes. It fixes what a step is, so it stays when the number of ranks
changes; `micro_batch` is what fits in memory and changes no result beyond rounding, except in stage 2 with
`controlnet.norm: batch`, whose statistics go over `micro_batch` x ranks samples.
"""


def page() -> str:
    """The page: one table per section of the recipe."""
    parts = [HEAD]
    for path, section, sentence in _sections(Recipe, "", None):
        title = f"`{path}`" if path else "Top level"
        note = f"\n{' '.join(sentence.split())}\n" if sentence else ""
        rows = [_row(path, name, field) for name, field in section.model_fields.items() if not section_of(field)]
        parts.append(f"\n## {title}\n{note}\n| key | value | default | |\n|---|---|---|---|\n" + "".join(rows))
    return "".join(parts)


def _sections(
    section: type[BaseModel], path: str, sentence: str | None
) -> Iterator[tuple[str, type[BaseModel], str | None]]:
    """Every group of settings, outer before inner: key, type, and description."""
    yield path, section, sentence
    for name, field in section.model_fields.items():
        nested = section_of(field)
        if nested:
            yield from _sections(nested, f"{path}.{name}".lstrip("."), field.description or nested.__doc__)
        elif item := next(filter(is_group, _nested(field.annotation)), None):
            yield from _sections(item, f"{path}.{name}[]".lstrip("."), item.__doc__)


def _nested(annotation: Any) -> Iterator[Any]:
    """A type and those that it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _nested(inner)


def _row(path: str, name: str, field: FieldInfo) -> str:
    key = f"{path}.{name}".lstrip(".")
    assert field.description, f"{key} has no sentence in recipes/schema.py"
    default = "required" if field.default is PydanticUndefined else f"`{yaml_line(field.default)}`"
    return f"| `{key}` | {_kind(field.annotation)} | {default} | {' '.join(field.description.split())} |\n"


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_kind(option) for option in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    if get_origin(annotation) in (list, tuple):
        return f"list of {_kind(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"map from {' to '.join(map(_kind, get_args(annotation)))}"
    if is_group(annotation):
        return "groups of settings"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names[annotation]


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(page(), encoding="utf-8")
