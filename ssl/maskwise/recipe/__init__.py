"""Recipes: YAML files resolved into frozen sections."""

from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe

__all__ = ["Recipe", "read_recipe"]
