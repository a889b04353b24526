"""Recipes: the typed configuration of a run, its loader, and one YAML file per published run."""

from .batch import BatchSplit
from .load import FOLDER, RecipeError, apply_overrides, explain, load_recipe, shipped_recipes
from .renames import with_new_names
from .schema import Recipe, Section
from .template import template
from .yaml_dialect import read_yaml

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
    "template",
    "with_new_names",
]
