"""Recipes: a chain of commands in a TOML file, run in one go and resumed where it was interrupted.

`reading` knows the file, `options` what each command takes, `journal` what is done already, `running` the order of it
all.
"""

from safelora_gguf.recipe.reading import Recipe, Step, read_recipe
from safelora_gguf.recipe.running import RunReport, run_recipe

__all__ = ["Recipe", "RunReport", "Step", "read_recipe", "run_recipe"]
