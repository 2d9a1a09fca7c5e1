"""The recipe: one TOML file, one typed object. Unknown keys are errors, and every derived value says why."""

from lorabake.recipe.check import check, check_values
from lorabake.recipe.checked import Checked
from lorabake.recipe.recipe import Choice, Recipe
from lorabake.recipe.seen import SeenCaption

__all__ = ["Checked", "Choice", "Recipe", "SeenCaption", "check", "check_values"]
