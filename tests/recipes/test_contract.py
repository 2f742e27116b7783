"""Recipes are found by looking, and refused when they break the contract."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.recipes import PAPERS, find
from thalweg.recipes.contract import PRESETS

GOOD = """
from dataclasses import dataclass
from typing import ClassVar
from thalweg.lab import Claim

@dataclass(frozen=True)
class Config:
    width: int = 3
    presets: ClassVar = {"smoke": {"width": 1}, "small": {}}

def run(config, lab):
    return [Claim("width", "none", config.width, holds=True)]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    name = f"made_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def add(package: Path, name: str, source: str) -> None:
    (package / name).mkdir()
    (package / name / "__init__.py").touch()
    (package / name / "recipe.py").write_text(source)


def test_finds_packages_named_for_papers_and_nothing_else(package: Path) -> None:
    add(package, "p12_noprop", GOOD)
    add(package, "p06_stochastic_neurons", GOOD)
    add(package, "shared", GOOD)
    (package / "p13_file.py").write_text(GOOD)
    recipes = find(package.name)
    assert [recipe.name for recipe in recipes.values()] == ["06_stochastic_neurons", "12_noprop"]
    assert recipes[12].presets == ("smoke", "small")
    assert recipes[12].config("smoke").width == 1
    assert recipes[12].config().width == 3


def test_finding_imports_no_recipe(package: Path) -> None:
    add(package, "p12_noprop", "raise RuntimeError('imported')")
    assert 12 in find(package.name)


def test_two_recipes_of_one_number_are_refused(package: Path) -> None:
    add(package, "p12_noprop", GOOD)
    add(package, "p12_again", GOOD)
    with pytest.raises(ArgumentError, match="one recipe for paper 12"):
        find(package.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def run", "def walk"), "no function run"),
        (("class Config", "class Settings"), "Config: expected a frozen dataclass"),
        (("(frozen=True)", ""), "Config: expected a frozen dataclass"),
        (('"smoke": {"width": 1}, ', ""), "at least 'smoke' and 'small'"),
        (('"width": 1', '"depth": 1'), "fields of Config only, got 'depth'"),
        (('"small": {}', '"small": {}, "huge": {}'), "presets: expected only smoke"),
    ],
)
def test_a_broken_contract_is_named(package: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    add(package, "p12_noprop", GOOD.replace(*change))
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        find(package.name)[12].config()


def test_every_recipe_in_the_package_keeps_the_contract() -> None:
    papers = {paper.number: paper.name for paper in PAPERS}
    for number, recipe in find().items():
        assert recipe.name == papers[number]
        assert set(recipe.presets) <= set(PRESETS)
        assert recipe.config("smoke") is not None


def test_the_papers_are_numbered_and_named_once() -> None:
    assert [paper.number for paper in PAPERS] == list(range(1, 28))
    for field in ("short_name", "title", "arxiv"):
        values = [getattr(paper, field) for paper in PAPERS]
        assert len(set(values)) == len(values)
        assert all(values)
