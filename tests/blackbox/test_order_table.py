"""The table of orders in the package's docstring names what exists, here and in the packages it points to."""

import re

import pytest
import torch

import thalweg
from thalweg import blackbox

ROWS = [line for line in blackbox.__doc__.splitlines() if re.match(r"\| [012]", line)]
THEIRS = ("NewtonCG", "NaturalGradient", "CubicRegularization")


def test_every_name_in_the_table_exists():
    assert {row[2] for row in ROWS} == {"0", "1", "2"}
    names = {name for row in ROWS for name in re.findall(r"`(?:[a-z.]*\.)?([A-Z]\w+)", row)}
    assert {"SPSA", "MeZO", "Backprop", "LBFGS", *THEIRS} <= names
    for name in names - set(THEIRS):
        assert any(hasattr(home, name) for home in (blackbox, thalweg, torch.optim)), name


def test_the_second_order_rows_are_in_the_package_they_are_left_to():
    modules = pytest.importorskip("torchzero").m
    assert all(hasattr(modules, name) for name in THEIRS)


def test_every_rule_of_the_package_stands_in_the_docstring():
    rules = [name for name in blackbox.__all__ if name[0].isupper()]
    absent = [name for name in rules if f"`{name}" not in blackbox.__doc__]
    # exceptions are described where they are raised
    assert set(absent) <= {"BudgetSpent"}
