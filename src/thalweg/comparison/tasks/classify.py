"""Handwritten digits, learned by every route from the same weights and the same order of the same data."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from thalweg.comparison.digit_routes import all_routes
from thalweg.comparison.measure import measure
from thalweg.comparison.pareto import accuracy_against_cost
from thalweg.comparison.rows import Comparison, Row
from thalweg.comparison.training import (
    NoiseOfEqualNorm,
    Route,
    accuracy,
    choose_learning_rate,
    initial_network,
    train,
)
from thalweg.data import Classification, digits, mnist
from thalweg.errors import ArgumentError, require_integer
from thalweg.lab import Claim, Job, Lab
from thalweg.step import Step
from thalweg.table import scaled

TITLE = "Handwritten digits by every route"
BIAS_STANDARD_ERROR = 0.05
WARM_UP_STEPS = 100
WARM_UP_RATE = 0.01


@dataclass(frozen=True, slots=True)
class Config:
    """What `thalweg compare classify` can be told.

    Args:
        data: "digits", the 8x8 set that scikit-learn bundles, or "mnist", the full set, whose archive
            `thalweg.data.mnist` says how to get.
        routes: names of the routes to run; none for all.
        steps: optimizer steps of each training run.
        seeds: number of seeds.
        seed: the first seed.
        batch: examples a step.
        device: "cpu" or "cuda".
    """

    data: Literal["digits", "mnist"] = "digits"
    routes: tuple[str, ...] = ()
    steps: int = 500
    seeds: int = 3
    seed: int = 0
    batch: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch"):
            require_integer(name, getattr(self, name), 1)
        require_integer("seed", self.seed, 0)
        names = [route.name for route in all_routes()]
        for name in self.routes:
            if name not in names:
                raise ArgumentError("routes", name, "names among " + ", ".join(names))


def run(config: Config, lab: Lab) -> tuple[Comparison, list[Claim]]:
    """Train and measure every route: the rows with their verdict, the claims, and a figure.

    Each route picks its step size from the same grid on held-out training data; the test data decide nothing.
    """
    data = _data(config)
    routes = [route for route in all_routes() if not config.routes or route.name in config.routes]
    names = [route.name for route in routes]
    learners = sum(route.learner for route in routes)
    lab.plan(len(routes) * (2 + config.seeds) + learners * config.seeds)
    tuned = lab.cells([Job(f"tune {name}", config.seed, _tune, (name, config)) for name in names])
    rates = {name: found["learning_rate"] for name, found in zip(names, tuned, strict=True)}
    # one after the other, so that nothing else runs while a step is timed
    measured = {
        route.name: lab.cell(
            f"measure {route.name}", partial(_measure, route, data, config), seed=config.seed
        )
        for route in routes
    }
    scores = _scores(routes, rates, measured, config, lab)
    rows = tuple(_row(route, scores, measured[route.name]) for route in routes)
    comparison = Comparison(
        task=f"classify {data.name}",
        verdict=verdict(rows, routes, data.name, config),
        rows=rows,
        settings={
            "data": data.name,
            "train_examples": len(data.train_labels),
            "test_examples": len(data.test_labels),
            "steps": config.steps,
            "seeds": list(range(config.seed, config.seed + config.seeds)),
            "batch": config.batch,
            "device": config.device,
        },
    )
    lab.table(comparison.verdict, comparison.columns(), [list(_cells(comparison, row)) for row in rows])
    lab.figure(
        "accuracy_against_cost",
        accuracy_against_cost(rows, {route.name for route in routes if route.control}),
        "What a trained network is worth against what its gradient costs, by route.",
    )
    return comparison, claims(rows, routes, chance=1 / data.classes)


def _cells(comparison: Comparison, row: Row) -> list[str]:
    return [row.cells()[name] for name in comparison.columns()]


def _data(config: Config) -> Classification:
    return digits() if config.data == "digits" else mnist()


def _named(name: str) -> Route:
    return next(route for route in all_routes() if route.name == name)


def _tune(name: str, config: Config) -> dict[str, Any]:
    rate, scores = choose_learning_rate(
        _named(name),
        _data(config),
        steps=max(1, config.steps // 2),
        seed=config.seed,
        batch=config.batch,
        device=config.device,
    )
    return {"learning_rate": rate, "held_out_accuracy": scores}


def _scores(
    routes: Sequence[Route], rates: dict[str, float], measured: dict[str, Any], config: Config, lab: Lab
) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by route, at equal steps and for learners at equal operations, one for each seed."""
    seeds = range(config.seed, config.seed + config.seeds)
    asked: list[tuple[str, str, int]] = []
    for route in routes:
        asked.append((route.name, "train", config.steps))
        twin = measured.get(route.reference)
        if route.learner and twin is not None:
            steps = round(config.steps * twin["operations"] / measured[route.name]["operations"])
            asked.append((route.name, "train at equal operations", max(1, min(steps, 2 * config.steps))))
    jobs = [
        Job(f"{kind} {name}", seed, _train, (name, rates[name], steps, seed, config))
        for name, kind, steps in asked
        for seed in seeds
    ]
    found = iter(lab.cells(jobs))
    scores: dict[str, dict[str, list[float]]] = {}
    for name, kind, _ in asked:
        scores.setdefault(name, {})[kind] = [next(found)["accuracy"] for _ in seeds]
    return scores


def _train(name: str, learning_rate: float, steps: int, seed: int, config: Config) -> dict[str, Any]:
    data = _data(config)
    network = train(
        _named(name),
        data,
        learning_rate=learning_rate,
        steps=steps,
        seed=seed,
        batch=config.batch,
        device=config.device,
    )
    return {"accuracy": accuracy(network, data.test_inputs, data.test_labels)}


def _row(route: Route, scores: dict[str, dict[str, list[float]]], measured: dict[str, Any]) -> Row:
    equal_steps = scores[route.name]["train"]
    equal_operations = scores[route.name].get("train at equal operations")
    return Row(
        route=route.name,
        network=route.network,
        reference=route.reference,
        needs=route.needs,
        accuracy=statistics.fmean(equal_steps),
        accuracy_sd=statistics.stdev(equal_steps) if len(equal_steps) > 1 else None,
        accuracy_equal_operations=statistics.fmean(equal_operations) if equal_operations else None,
        **measured,
    )


def _measure(route: Route, data: Classification, config: Config) -> dict[str, Any]:
    """Cost and fidelity on one batch, at the weights of the reference after a short training."""
    inputs = data.train_inputs[: config.batch].to(config.device)
    labels = data.train_labels[: config.batch].to(config.device)

    def step_of(network: Any) -> Step:
        return Step(network, lambda: network.losses(inputs, labels), tuple(network.parameters()))

    if route.other_objective:
        own = initial_network(route, data, config.seed, config.device)
        return measure(step_of(own.train()), route.rule, None, faithful=False)
    reference = _named(route.reference)
    trained = train(
        reference,
        data,
        learning_rate=WARM_UP_RATE,
        steps=WARM_UP_STEPS,
        seed=config.seed,
        batch=config.batch,
        device=config.device,
    )

    def network_of(one: Route) -> Any:
        network = initial_network(one, data, config.seed, config.device)
        # units differ in their buffers (how steep a slope is now), never in what is learned
        with torch.no_grad():
            for own, other in zip(network.parameters(), trained.parameters(), strict=True):
                own.copy_(other)
        return network.train()

    twin, network = network_of(reference), network_of(route)
    exact = torch.autograd.grad(twin.losses(inputs, labels).mean(), twin.judged())
    return measure(
        step_of(network),
        route.rule,
        exact,
        judged=network.judged(),
        standard_error=BIAS_STANDARD_ERROR,
    )


def verdict(rows: tuple[Row, ...], routes: list[Route], data: str, config: Config) -> str:
    """The outcome in one line."""
    by_name = {row.route: row for row in rows}
    learners = {route.name for route in routes if route.learner}
    others = [route for route in routes if not route.control and route.name != route.reference]
    estimators = {route.name for route in others} - learners
    parts = []
    exact = by_name.get("backprop")
    if exact is not None:
        parts.append(f"backprop {_percent(exact)} keeping {scaled(exact.saved_bytes, 'B')}")
    smooth = [row for row in rows if row.network == "smooth" and row.route in estimators]
    forward = [row for row in smooth if "backward" not in (row.needs or "")]
    if forward:
        best = max(forward, key=lambda row: row.accuracy or 0.0)
        kept = scaled(best.saved_bytes, "B")
        parts.append(f"best without a backward pass: {best.route} {_percent(best)} keeping {kept}")
    estimated = [row for row in rows if row.network == "hard units" and row.route in estimators]
    if estimated:
        best = max(estimated, key=lambda row: row.accuracy or 0.0)
        through = f"best through hard units: {best.route} {_percent(best)}"
        twin = by_name.get("expected-loss")
        parts.append(through + (f" (exact expectation {_percent(twin)})" if twin else ""))
    local = [row for row in rows if row.route in learners]
    if local:
        best = max(local, key=lambda row: row.accuracy or 0.0)
        parts.append(f"best without a global backward: {best.route} {_percent(best)}")
    if "last-layer-only" in by_name:
        parts.append(f"control, last layer alone: {_percent(by_name['last-layer-only'])}")
    setting = f"{data}, {config.steps} steps, {config.seeds} seed{'s' if config.seeds > 1 else ''}"
    return f"{setting}: " + "; ".join(parts)


def _percent(row: Row) -> str:
    return "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %"


def claims(rows: tuple[Row, ...], routes: list[Route], chance: float) -> list[Claim]:
    """What the comparison asserts about its own rows."""
    kinds = {route.name: route for route in routes}
    found: list[Claim] = []
    for row in rows:
        route, bias, spread = kinds[row.route], row.bias, row.bias_se
        if route.name == route.reference and not route.other_objective:
            exact = row.cosine is not None and abs(row.cosine - 1) < 1e-6 and bias == 0
            found.append(_claim(f"{row.route}: cosine is 1 and bias is 0", row.cosine, None, exact))
        elif route.unbiased and bias is not None and spread is not None:
            small = spread <= BIAS_STANDARD_ERROR
            statement = f"{row.route}: bias within 5 standard errors, and these at most {BIAS_STANDARD_ERROR}"
            found.append(_claim(statement, bias, spread, small and abs(bias) <= 5 * spread))
        elif row.route == "straight-through" and bias is not None and spread is not None:
            statement = "straight-through: its bias is visible, beyond 5 standard errors"
            found.append(_claim(statement, bias, spread, abs(bias) > 5 * spread))
        if isinstance(route.rule, NoiseOfEqualNorm):
            statement = (
                f"{row.route}: noise as long as the gradient learns nothing (accuracy below chance + 0.1)"
            )
            learned = row.accuracy is not None and row.accuracy < chance + 0.1
            found.append(_claim(statement, row.accuracy, row.accuracy_sd, learned))
    return found


def _claim(statement: str, measured: float | None, spread: float | None, holds: bool) -> Claim:
    return Claim(
        statement=statement, reported=None, measured=measured, spread=spread, holds=holds, asserted=True
    )
