"""`thalweg`, but `run` looks for its recipes in toy_recipes."""

import sys
from functools import partial

from thalweg import cli
from thalweg.recipes.command import main

cli._COMMANDS["run"] = partial(main, package="toy_recipes")

if __name__ == "__main__":
    sys.exit(cli.main())
