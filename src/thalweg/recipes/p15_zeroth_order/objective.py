"""The number of wrong answers, which has no derivative, made smaller directly from a trained start."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import thalweg as tw
from thalweg.data import Classification
from thalweg.lab import Claim
from thalweg.recipes.p15_zeroth_order.controls import Directionless
from thalweg.recipes.p15_zeroth_order.orders import HELD_OUT, SOURCE, accuracy, orders, prepared, train

PRETRAINING = 60
LEARNING_RATES = (0.003, 0.01, 0.03)


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of the panel.

    Args:
        name: in tables and figures.
        loss: "0-1", the share of wrong answers, or "cross-entropy".
        rule: fills `.grad`.
        learning_rates: the grid from which held-out training data choose.
    """

    name: str
    loss: Literal["0-1", "cross-entropy"]
    rule: tw.Rule
    learning_rates: tuple[float, ...] = LEARNING_RATES


def objectives() -> tuple[Objective, ...]:
    """The rows; the scale is wide, since the share of wrong answers is flat between its steps."""
    pairs = tw.SPSA(directions="gaussian", scale=0.05, samples=4)
    return (
        Objective("0-1 loss, SPSA", "0-1", pairs),
        Objective("0-1 loss, ranks", "0-1", tw.EvolutionStrategies(scale=0.05, samples=4, weights="ranks")),
        Objective("cross-entropy, SPSA", "cross-entropy", pairs),
        Objective("cross-entropy, backprop", "cross-entropy", tw.Backprop(), (0.03, 0.1, 0.3)),
        Objective("control: no direction", "0-1", Directionless(pairs)),
    )


def zero_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """1 where the answer is wrong, shape (batch,)."""
    wrong: Tensor = model(x).argmax(dim=1) != y
    return wrong.to(x.dtype)


def optimise(objective: Objective, learning_rate: float, steps: int, seed: int) -> dict[str, Any]:
    """From the same backprop start, so many steps on one batch: all training digits that are not held out."""
    data = prepared("standardised")
    fit, held_out = data.split_train(fraction=HELD_OUT, seed=seed)
    model = train(orders()[0], fit, learning_rate=0.1, steps=PRETRAINING, seed=seed)
    x, y = fit.train_inputs, fit.train_labels
    before = _judged(model, x, y, held_out, data)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=learning_rate)

    def loss() -> Tensor:
        if objective.loss == "0-1":
            return zero_one(model, x, y)
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    curve: list[tuple[int, float]] = [(0, 100 - accuracy(model, x, y))]
    evaluations = 0

    def counted() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return loss()

    for step in range(1, steps + 1):
        optimizer.zero_grad()
        tw.backward(counted, weights, gradient=objective.rule, key=tw.Key(seed, step))
        optimizer.step()
        if step % max(1, steps // 50) == 0:
            curve.append((step, 100 - accuracy(model, x, y)))
    return {
        "before": before,
        "after": _judged(model, x, y, held_out, data),
        "curve": curve,
        "learning_rate": learning_rate,
        "evaluations": evaluations,
    }


def _judged(
    model: nn.Module, x: Tensor, y: Tensor, held_out: Classification, data: Classification
) -> dict[str, float]:
    with torch.no_grad():
        wrong = float(zero_one(model, x, y).double().mean())
    return {
        "zero_one": wrong,
        "held_out": accuracy(model, held_out.train_inputs, held_out.train_labels),
        "test": accuracy(model, data.test_inputs, data.test_labels),
    }


def at_best_rate(by_rate: Mapping[float, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results, one for each seed, of the step size with the best mean held-out accuracy; ties go to the
    smaller. One seed's 280 held-out digits would tell the rates of the 0-1 loss apart by a digit or none.
    """

    def score(rate: float) -> float:
        return statistics.fmean(each["after"]["held_out"] for each in by_rate[rate])

    return list(by_rate[max(by_rate, key=lambda rate: (score(rate), -rate))])


def claims(found: Mapping[str, Sequence[Mapping[str, Any]]], *, decisive: bool) -> list[Claim]:
    """What must hold of both rules that optimise the 0-1 loss, and beside it the other rows.

    Args:
        found: results of `optimise` by row, one for each seed.
        decisive: False where the run is too short to decide anything.
    """
    judged: list[Claim] = []
    for name, results in found.items():
        asserted = decisive and name.startswith("0-1 loss")
        gained = [each["after"]["test"] - each["before"]["test"] for each in results]
        fallen = [100 * (each["before"]["zero_one"] - each["after"]["zero_one"]) for each in results]
        for said, values, holds in (
            (
                "held-out accuracy does not fall on any seed (points gained on the test digits)",
                gained,
                min(gained) >= 0,
            ),
            ("0-1 loss on the training batch falls on every seed (by, in points)", fallen, min(fallen) > 0),
        ):
            spread = statistics.stdev(values) if len(values) > 1 else None
            mean = statistics.fmean(values)
            verdict = holds if asserted else None
            judged.append(Claim(f"{name}: {said}", SOURCE, mean, spread, verdict, asserted=asserted))
    return judged
