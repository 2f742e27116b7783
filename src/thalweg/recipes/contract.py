"""What a recipe is, and how the recipes of a package are found: by looking, without a register."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

from thalweg.errors import ArgumentError, ArgumentTypeError, describe
from thalweg.lab import Claim, Lab

PRESETS = ("smoke", "small", "gpu", "paper")
_PACKAGE = re.compile(r"p(\d\d)_([a-z0-9_]+)")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that was found; its module is imported only when `config` or `run` is called.

    Args:
        number: the paper's number, 1 .. 99.
        short_name: the rest of the package's name, for example "stochastic_neurons".
        module: full name of the module that holds `Config` and `run`.
    """

    number: int
    short_name: str
    module: str

    @property
    def name(self) -> str:
        """Number and short name, as in the names of runs and results: "06_stochastic_neurons"."""
        return f"{self.number:02d}_{self.short_name}"

    @property
    def presets(self) -> tuple[str, ...]:
        """The presets that the recipe's `Config` has, smallest first."""
        return tuple(name for name in PRESETS if name in self._config_class().presets)

    def config(self, preset: str = "small") -> Any:
        """The recipe's `Config` under a preset.

        Raises:
            ArgumentError, ArgumentTypeError: the recipe breaks the contract, or has no such preset.
        """
        config = self._config_class()
        if preset not in config.presets:
            raise ArgumentError("preset", preset, f"one of {', '.join(self.presets)} for recipe {self.name}")
        return replace(config(), **config.presets[preset])

    def run(self, config: Any, lab: Lab) -> list[Claim]:
        """Run the recipe in a lab, and hand its claims in.

        Raises:
            ArgumentTypeError: the recipe returned something else than claims.
        """
        run: Callable[[Any, Lab], list[Claim]] = self._module().run
        claims = run(config, lab)
        if not isinstance(claims, list) or not all(isinstance(claim, Claim) for claim in claims):
            raise ArgumentTypeError(f"{self.module}.run", claims, "a list of claims as its return value")
        if not claims:
            raise ArgumentError(f"{self.module}.run", "no claims", "at least one claim")
        lab.claims(claims)
        return claims

    def _module(self) -> ModuleType:
        module = importlib.import_module(self.module)
        if not callable(getattr(module, "run", None)):
            raise ArgumentError(self.module, "no function run", "run(config, lab) -> list[Claim]")
        return module

    def _config_class(self) -> Any:
        config = getattr(self._module(), "Config", None)
        where = f"{self.module}.Config"
        if not isinstance(config, type) or not is_dataclass(config) or not _frozen(config):
            raise ArgumentTypeError(where, config, "a frozen dataclass")
        presets = getattr(config, "presets", None)
        if not isinstance(presets, Mapping) or "smoke" not in presets or "small" not in presets:
            mend = "Write `presets: ClassVar = {'smoke': {'steps': 2}, 'small': {}}`: fields by preset."
            raise ArgumentTypeError(
                f"{where}.presets", presets, "a mapping with at least 'smoke' and 'small'", mend
            )
        known = {field.name for field in fields(config)}
        for name, changes in presets.items():
            if name not in PRESETS:
                raise ArgumentError(f"{where}.presets", name, "only " + ", ".join(PRESETS))
            unknown = sorted(set(changes) - known)
            if unknown:
                raise ArgumentError(f"{where}.presets[{name!r}]", unknown[0], "fields of Config only")
        return config


def find(package: str = "thalweg.recipes") -> dict[int, Recipe]:
    """Find the recipes of a package: its subpackages `pNN_short_name` that hold `recipe.py`.

    Args:
        package: full name of an importable package.

    Returns:
        The recipes by number, in order.

    Raises:
        ArgumentError: two recipes share a number.

    Example:
        >>> all(recipe.name.startswith(f"{number:02d}_") for number, recipe in find().items())
        True
    """
    found: dict[int, Recipe] = {}
    parent = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(parent.__path__), key=lambda info: info.name):
        match = _PACKAGE.fullmatch(info.name)
        if match is None or not info.ispkg:
            continue
        recipe = Recipe(int(match[1]), match[2], f"{package}.{info.name}.recipe")
        if recipe.number in found:
            raise ArgumentError(package, describe(info.name), f"one recipe for paper {recipe.number}")
        found[recipe.number] = recipe
    return found


def _frozen(config: type) -> bool:
    return bool(config.__dataclass_params__.frozen)  # type: ignore[attr-defined]
