"""Which order of derivative to buy: the same tasks by backprop, by one forward derivative, by values alone.

Panels: digits by every order of derivative; an objective that has none. Step sizes are chosen on held-out
training data of the run's first seed; the test data choose nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from thalweg.errors import ArgumentError, require_integer
from thalweg.lab import Claim, Lab
from thalweg.recipes.p15_zeroth_order import figures, objective, orders, tables

Panel = Literal["orders", "mezo", "neuro", "objective"]
PANELS: tuple[Panel, ...] = ("orders", "mezo", "neuro", "objective")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        panels: which parts to run, of "orders", "mezo", "neuro", "objective".
        orders_steps: of each row of the panel of orders.
        orders_search: steps of each run that chooses a step size there.
        objective_steps: on the number of wrong answers, and of each run that chooses a step size for it.
    """

    panels: tuple[Panel, ...] = PANELS
    orders_steps: int = 4000
    orders_search: int = 2000
    objective_steps: int = 500

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"orders_steps": 10, "orders_search": 5, "objective_steps": 5},
        "small": {},
    }

    def __post_init__(self) -> None:
        if not self.panels or not set(self.panels) <= set(PANELS):
            raise ArgumentError("panels", self.panels, f"some of {', '.join(PANELS)}")
        for name in ("orders_steps", "orders_search", "objective_steps"):
            require_integer(name, getattr(self, name), 1)


def run(config: Config, lab: Lab) -> list[Claim]:
    """Run the panels asked for, in the order of `PANELS`."""
    judged: list[Claim] = []
    if "orders" in config.panels:
        judged += _orders(config, lab)
    if "objective" in config.panels:
        judged += _objective(config, lab)
    return judged


def _orders(config: Config, lab: Lab) -> list[Claim]:
    rows, first = orders.orders(), lab.seeds[0]
    rates: dict[str, float] = {}
    for row in rows:
        if row.learning_rate_of is not None:
            rates[row.name] = rates[row.learning_rate_of] * row.factor
            continue
        choose = partial(orders.choose_learning_rate, row, config.orders_search, first)
        rates[row.name] = lab.cell(f"orders: step size of {row.name}", choose, seed=first)["learning_rate"]

    def trained(row: orders.Order, seed: int) -> dict[str, Any]:
        ticker = lab.progress(config.orders_steps, row.name)
        return orders.learn(row, rates[row.name], config.orders_steps, seed, ticker)

    found = {
        row.name: [
            lab.cell(f"orders: {row.name}", partial(trained, row, seed), seed=seed) for seed in lab.seeds
        ]
        for row in rows
    }
    costs = lab.cell("orders: costs", lambda: {row.name: orders.step_cost(row) for row in rows}, seed=first)
    tables.orders(lab, found, costs, config.orders_steps)
    lab.figure(
        "orders",
        figures.orders(found, costs),
        "Digits by every order of derivative at equal steps (mean and single seeds; hollow: control), and "
        "what one step takes.",
    )
    lab.figure(
        "orders_learning",
        figures.learning(found, costs),
        "The same runs by steps, by evaluations of the network, and by counted operations.",
    )
    lab.figure(
        "preparation",
        figures.preparation(found),
        "How the pixels are prepared decides how far noise gets: correlated inputs hurt it, not backprop.",
    )
    return orders.claims(found, decisive=lab.preset != "smoke")


def _objective(config: Config, lab: Lab) -> list[Claim]:
    rows, first, steps = objective.objectives(), lab.seeds[0], config.objective_steps
    rates = {}
    for row in rows:
        choose = partial(objective.choose_learning_rate, row, steps, first)
        rates[row.name] = lab.cell(f"objective: step size of {row.name}", choose, seed=first)["learning_rate"]
    found = {
        row.name: [
            lab.cell(
                f"objective: {row.name}",
                partial(objective.optimise, row, rates[row.name], steps, seed),
                seed=seed,
            )
            for seed in lab.seeds
        ]
        for row in rows
    }
    tables.objective(lab, found)
    lab.figure(
        "objective",
        figures.objective(found),
        "Wrong answers on the training batch while they are what is optimised, and test accuracy before and "
        "after; dashed: controls.",
    )
    return objective.claims(found, decisive=lab.preset != "smoke")
