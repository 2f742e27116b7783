"""One package per paper: `pNN_short_name/recipe.py` with a frozen `Config` and `run(config, lab)`."""

from thalweg.recipes.contract import Recipe, find
from thalweg.recipes.papers import PAPERS, Paper

__all__ = ["PAPERS", "Paper", "Recipe", "find"]
