"""Which order of derivative to buy: the same tasks by backprop, by one forward derivative, by values alone.

Panels: digits by every order of derivative; a language model fine-tuned by forward passes; adaptation by
intrinsic noise; an objective without a derivative. Step sizes are chosen on held-out training data of the
run, or (language model, adaptation) were chosen on seeds that judge nothing; the test data choose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from safetensors.torch import load_file

from thalweg.errors import ArgumentError, require_integer
from thalweg.lab import Claim, Job, Lab
from thalweg.recipes.p15_zeroth_order import (
    figures,
    figures_mezo,
    figures_neuro,
    language_model,
    memory,
    mezo,
    neuro,
    objective,
    orders,
    tables,
)

Panel = Literal["orders", "mezo", "neuro", "objective"]
PANELS: tuple[Panel, ...] = ("orders", "mezo", "neuro", "objective")


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of the recipe.

    Args:
        panels: which parts to run, of "orders", "mezo", "neuro", "objective".
        orders_steps: of each row of the panel of orders.
        orders_search: steps of each run that chooses a step size there.
        mezo_pretraining: steps of Adam by which the language model gets its weights.
        mezo_adam_steps: of the reference in fine-tuning; MeZO evaluates the loss 50 times as often.
        neuro_ticks: of adaptation on the toy.
        neuro_tracking_ticks: of adaptation while it tracks signals.
        neuro_trials: of adaptation on the cart-pole.
        objective_steps: on the number of wrong answers, at each step size that is tried.
    """

    panels: tuple[Panel, ...] = PANELS
    orders_steps: int = 4000
    orders_search: int = 2000
    mezo_pretraining: int = 1000
    mezo_adam_steps: int = 50
    neuro_ticks: int = 4000
    neuro_tracking_ticks: int = 10000
    neuro_trials: int = 600
    objective_steps: int = 500

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "orders_steps": 10,
            "orders_search": 5,
            "mezo_pretraining": 5,
            "mezo_adam_steps": 1,
            "neuro_ticks": 40,
            "neuro_tracking_ticks": 40,
            "neuro_trials": 2,
            "objective_steps": 5,
        },
        "small": {},
    }

    def __post_init__(self) -> None:
        if not self.panels or not set(self.panels) <= set(PANELS):
            raise ArgumentError("panels", self.panels, f"some of {', '.join(PANELS)}")
        for name in ("orders_steps", "orders_search", "objective_steps"):
            require_integer(name, getattr(self, name), 1)
        for name in ("mezo_pretraining", "mezo_adam_steps"):
            require_integer(name, getattr(self, name), 1)
        for name in ("neuro_ticks", "neuro_tracking_ticks", "neuro_trials"):
            require_integer(name, getattr(self, name), 1)


def run(config: Config, lab: Lab) -> list[Claim]:
    """Run the panels asked for, in the order of `PANELS`."""
    judged: list[Claim] = []
    if "orders" in config.panels:
        judged += _orders(config, lab)
    if "mezo" in config.panels:
        judged += _mezo(config, lab)
    if "neuro" in config.panels:
        judged += _neuro(config, lab)
    if "objective" in config.panels:
        judged += _objective(config, lab)
    return judged


def _orders(config: Config, lab: Lab) -> list[Claim]:
    rows, first = orders.orders(), lab.seeds[0]
    searched = [row for row in rows if row.learning_rate_of is None]
    chosen = _cells(
        lab,
        [
            Job(
                f"orders: step size of {row.name}",
                first,
                orders.choose_learning_rate,
                (row, config.orders_search, first),
            )
            for row in searched
        ],
    )
    rates = {row.name: found["learning_rate"] for row, found in zip(searched, chosen, strict=True)}
    for row in rows:
        if row.learning_rate_of is not None:
            rates[row.name] = rates[row.learning_rate_of] * row.factor
    jobs = [
        Job(f"orders: {row.name}", seed, orders.learn, (row, rates[row.name], config.orders_steps, seed))
        for row in rows
        for seed in lab.seeds
    ]
    found = _by_row([row.name for row in rows], _cells(lab, jobs))
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


def _mezo(config: Config, lab: Lab) -> list[Claim]:
    def pretrain(seed: int) -> dict[str, float]:
        model = mezo.pretrain(
            seed, config.mezo_pretraining, lab.progress(config.mezo_pretraining, "pretraining")
        )
        lab.save(f"language_model_{seed}", model.state_dict())
        return {"held_out": mezo.judge(model, language_model.corpus(seed).held_out)}

    for seed in lab.seeds:
        lab.cell("mezo: pretraining", partial(pretrain, seed), seed=seed)
    weights = {
        seed: load_file(lab.out / "weights" / f"language_model_{seed}.safetensors") for seed in lab.seeds
    }
    jobs = [
        Job(f"mezo: {route.name}", seed, mezo.fine_tune, (route, weights[seed], config.mezo_adam_steps, seed))
        for route in mezo.ROUTES
        for seed in lab.seeds
    ]
    found = _by_row([route.name for route in mezo.ROUTES], _cells(lab, jobs))
    bytes_of = lab.cell("mezo: memory", memory.memory, seed=lab.seeds[0])
    tables.mezo(lab, found, bytes_of)
    lab.figure(
        "mezo",
        figures_mezo.mezo_figure(found, bytes_of),
        "A pretrained language model learns a new way of writing from forward passes alone (mean and range "
        "over seeds; hollow: from random weights, and a control), in the memory of inference.",
    )
    return [*mezo.claims(found, decisive=lab.preset != "smoke"), *memory.claims(bytes_of)]


def _neuro(config: Config, lab: Lab) -> list[Claim]:
    tasks = (
        ("toy", neuro.toy, config.neuro_ticks),
        ("tracking", neuro.track, config.neuro_tracking_ticks),
        ("cart-pole", neuro.balance, config.neuro_trials),
    )
    jobs = [
        Job(f"neuro: {task}, {route}", seed, function, (route, ticks, seed))
        for task, function, ticks in tasks
        for route in neuro.ROUTES
        for seed in lab.seeds
    ]
    results = _cells(lab, jobs)
    each = len(results) // len(tasks)
    toys, tracked, poles = (_by_row(neuro.ROUTES, results[each * index :][:each]) for index in range(3))
    lab.figure(
        "neuro",
        figures_neuro.neuro_figure(toys, tracked, poles),
        "Adaptation by intrinsic noise, one reward a tick and no derivative: above what the means are worth "
        "while they learn (pale: further seeds), below the first seed at work.",
    )
    return neuro.claims(toys, tracked, poles, decisive=lab.preset != "smoke")


def _objective(config: Config, lab: Lab) -> list[Claim]:
    tried = [(row, rate) for row in objective.objectives() for rate in row.learning_rates]
    results = _cells(
        lab,
        [
            Job(
                f"objective: {row.name} at {rate:g}",
                seed,
                objective.optimise,
                (row, rate, config.objective_steps, seed),
            )
            for row, rate in tried
            for seed in lab.seeds
        ],
    )
    by_rate: dict[str, dict[float, list[Any]]] = {}
    for index, (row, rate) in enumerate(tried):
        by_rate.setdefault(row.name, {})[rate] = results[index * len(lab.seeds) :][: len(lab.seeds)]
    found = {name: objective.at_best_rate(rates) for name, rates in by_rate.items()}
    tables.objective(lab, found)
    lab.figure(
        "objective",
        figures.objective(found),
        "Wrong answers on the training batch while they are what is optimised, and test accuracy before and "
        "after; dashed: controls.",
    )
    return objective.claims(found, decisive=lab.preset != "smoke")


def _cells(lab: Lab, jobs: Sequence[Job]) -> list[Any]:
    # a run of seconds would spend more of them on starting workers
    return lab.cells(jobs, workers=1 if lab.preset == "smoke" else None)


def _by_row(names: Sequence[str], results: Sequence[Any]) -> dict[str, list[Any]]:
    each = len(results) // len(names)
    return {name: list(results[each * index :][:each]) for index, name in enumerate(names)}
