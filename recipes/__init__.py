"""Recipes: the typed configuration of a run, its loader, and one YAML file per published run.

What needs pydantic or a YAML parser is imported at its first use, so that commands start without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .batch import BatchSplit
from .load import FOLDER, RecipeError, apply_overrides, explain, load_recipe, shipped_recipes
from .renames import with_new_names

if TYPE_CHECKING:
    from .schema import Recipe
    from .section import Section
    from .yaml_dialect import read_yaml

_MODULE_OF = {"Recipe": "schema", "Section": "section", "read_yaml": "yaml_dialect"}

__all__ = [
    "FOLDER",
    "BatchSplit",
    "Recipe",
    "RecipeError",
    "Section",
    "apply_overrides",
    "explain",
    "load_recipe",
    "read_yaml",
    "shipped_recipes",
    "with_new_names",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
