"""Recipes: the typed description of a run, its loader, and one YAML file a published run."""

from .load import FOLDER, RecipeError, apply_overrides, load_recipe, shipped_recipes, to_yaml
from .schema import Recipe

__all__ = ["FOLDER", "Recipe", "RecipeError", "apply_overrides", "load_recipe", "shipped_recipes", "to_yaml"]
