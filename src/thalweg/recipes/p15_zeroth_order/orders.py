"""Digits learned by rules of falling order: backprop, noise on units, noise on weights.

The pixels are standardised: then the grids of step sizes reach past the best one of backprop, of both node
perturbations and of SPSA. With pixels that are only centred, node perturbation and SPSA are best at the ends
of theirs, and SPSA comes close to 95 % or passes it. Centred and raw pixels are rows of their own, reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import thalweg as tw
from thalweg.data import Classification, digits
from thalweg.errors import NonFiniteError
from thalweg.lab import Claim
from thalweg.recipes.p15_zeroth_order.controls import Directionless

Inputs = Literal["standardised", "centred", "raw"]
WIDTH = 64
BATCH = 64
HELD_OUT = 0.2
EVERY = 100
SOURCE = "none: the review has no experiments"


@dataclass(frozen=True, slots=True)
class Order:
    """A row of the panel.

    Args:
        name: in tables and figures.
        rule: fills `.grad`.
        learning_rates: the grid of three from which held-out training data choose; empty with
            `learning_rate_of`.
        inputs: how the pixels are prepared.
        decorrelation: rate of the decorrelating matrix before each layer; None for no such matrix.
        learning_rate_of: the row whose step size this one takes over, in place of a choice of its own.
        factor: by which it multiplies that step size.
    """

    name: str
    rule: tw.Rule
    learning_rates: tuple[float, ...] = ()
    inputs: Inputs = "standardised"
    decorrelation: float | None = None
    learning_rate_of: str | None = None
    factor: float = 1.0


GRADIENT = (0.3, 1.0, 3.0)
UNITS = (0.01, 0.03, 0.1)
WEIGHTS = (0.001, 0.003, 0.01)
SIZE = 64 * WIDTH + WIDTH * 10
FOUR = 4 * (SIZE + 2) / (SIZE + 5)
"""How much more step the second moment of four averaged samples allows than that of one."""


def orders() -> tuple[Order, ...]:
    """The rows that are compared: first the panel's own, then other pixels, then the control."""
    gaussian, nodes = tw.SPSA(directions="gaussian"), tw.NodePerturbation()
    four, forward = tw.SPSA(directions="gaussian", samples=4), tw.ForwardGradient(directions="gaussian")
    return (
        Order("backprop", tw.Backprop(), GRADIENT),
        Order("activity perturbation", tw.NodePerturbation(mode="activity"), UNITS),
        Order("node perturbation", nodes, UNITS),
        Order("node perturbation + decorrelation", nodes, UNITS, decorrelation=0.01),
        Order("SPSA", gaussian, WEIGHTS),
        Order("SPSA, Rademacher", tw.SPSA(), learning_rate_of="SPSA"),
        Order("SPSA, 4 samples", four, learning_rate_of="SPSA", factor=FOUR),
        Order("forward gradient", forward, learning_rate_of="SPSA"),
        Order("backprop, centred", tw.Backprop(), GRADIENT, "centred"),
        Order("node perturbation, centred", nodes, UNITS, "centred"),
        Order("SPSA, centred", gaussian, WEIGHTS, "centred"),
        Order("backprop, raw", tw.Backprop(), GRADIENT, "raw"),
        Order("node perturbation, raw", nodes, UNITS, "raw"),
        Order("node perturbation + decorrelation, raw", nodes, UNITS, "raw", 0.01),
        Order("SPSA, raw", gaussian, WEIGHTS, "raw"),
        Order("control: no direction", Directionless(tw.Backprop()), learning_rate_of="backprop"),
    )


def network(seed: int, decorrelation: float | None = None) -> nn.Sequential:
    """64-64-10 with rectifiers and no biases, 4736 weights, He initialisation."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((64, WIDTH), (WIDTH, 10)):
        if decorrelation is not None:
            layers.append(tw.Decorrelation(fan_in, decorrelation))
        layer = nn.Linear(fan_in, fan_out, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(fan_out, fan_in, generator=generator) * (2 / fan_in) ** 0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def prepared(inputs: Inputs) -> Classification:
    """The digits of scikit-learn, prepared by the statistics of the training part."""
    data = digits()
    if inputs == "raw":
        return data
    mean, spread = data.train_inputs.mean(dim=0), torch.ones(())
    if inputs == "standardised":
        spread = data.train_inputs.std(dim=0)
        # a pixel that is white in every digit stays where it is
        spread = torch.where(spread > 0, spread, 1.0)
    return replace(
        data,
        train_inputs=(data.train_inputs - mean) / spread,
        test_inputs=(data.test_inputs - mean) / spread,
    )


def train(
    order: Order,
    data: Classification,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Plain gradient descent at a constant step size; a run that leaves the finite numbers ends there.

    Weights at the start, batches and keys depend on the seed alone: they are the same for all rows.
    """
    model = network(seed, order.decorrelation)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if watch is not None:
            watch(step, model)
        chosen = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
        x, y = data.train_inputs[chosen], data.train_labels[chosen]

        def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y, reduction="none")

        optimizer.zero_grad()
        try:
            tw.backward(losses, weights, gradient=order.rule, key=tw.Key(seed, step))
        except NonFiniteError:
            break
        optimizer.step()
    return model


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Right answers in percent; the training flag is left as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        right = model(inputs).argmax(dim=1) == labels
    model.train(training)
    return 100 * float(right.double().mean())


def choose_learning_rate(order: Order, steps: int, seed: int) -> dict[str, Any]:
    """The best step size of the row's grid by held-out training data; of equals the smaller."""
    fit, held_out = prepared(order.inputs).split_train(fraction=HELD_OUT, seed=seed)
    scores = {}
    for rate in order.learning_rates:
        model = train(order, fit, learning_rate=rate, steps=steps, seed=seed)
        scores[rate] = accuracy(model, held_out.train_inputs, held_out.train_labels)
    best = max(scores, key=lambda rate: (scores[rate], -rate))
    return {"learning_rate": best, "held_out": {str(rate): value for rate, value in scores.items()}}


def learn(order: Order, learning_rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train on all training digits; test accuracy at the end, and at every hundredth step on the way."""
    data = prepared(order.inputs)
    curve: list[tuple[int, float]] = []

    def watch(step: int, model: nn.Module) -> None:
        if step % EVERY == 0:
            curve.append((step, accuracy(model, data.test_inputs, data.test_labels)))

    model = train(order, data, learning_rate=learning_rate, steps=steps, seed=seed, watch=watch)
    final = accuracy(model, data.test_inputs, data.test_labels)
    return {"accuracy": final, "learning_rate": learning_rate, "curve": [*curve, (steps, final)]}


def after(result: Mapping[str, Any], step: float) -> float:
    """The test accuracy that a run of `learn` had at this step, or at the last one looked at before."""
    return next(float(value) for at, value in reversed(result["curve"]) if at <= step)


def step_cost(order: Order) -> dict[str, Any]:
    """What one step of the row costs, counted."""
    data, model = prepared(order.inputs), network(0, order.decorrelation)
    x, y = data.train_inputs[:BATCH], data.train_labels[:BATCH]
    step = (model, lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), model.parameters())
    found = tw.cost(step, gradient=order.rule, repeats=0)
    return {
        "evaluations": found.evaluations,
        "operations": found.operations,
        "saved_bytes": found.saved_bytes,
        "peak_bytes": found.peak_bytes,
    }


def claims(found: Mapping[str, Sequence[Mapping[str, Any]]], *, decisive: bool) -> list[Claim]:
    """What must hold at equal steps, and beside it what the preparation of the pixels does to it.

    Args:
        found: results of `learn` by row, one for each seed.
        decisive: False where the run is too short to decide anything.
    """
    values = {name: [each["accuracy"] for each in results] for name, results in found.items()}
    mean = {name: statistics.fmean(each) for name, each in values.items()}

    def claim(statement: str, measured: float, holds: bool, row: str = "", asserted: bool = True) -> Claim:
        several = row in values and len(values[row]) > 1
        spread = statistics.stdev(values[row]) if several else None
        verdict = holds if decisive else None
        return Claim(statement, SOURCE, measured, spread, verdict, asserted=asserted and decisive)

    exact, units, weights = mean["backprop"], mean["node perturbation"], mean["SPSA"]
    activity, forward = mean["activity perturbation"], mean["forward gradient"]
    stated = [
        (
            "backprop is at least as accurate as node perturbation (points ahead)",
            exact - units,
            exact >= units,
        ),
        ("node perturbation is at least 2 points ahead of SPSA", units - weights, units - weights >= 2),
        (
            "forward gradient and central SPSA lie within 2 points at equal step size (same directions)",
            abs(forward - weights),
            abs(forward - weights) <= 2,
        ),
        (
            "activity perturbation lies within 1.5 points of backprop (points behind)",
            exact - activity,
            abs(exact - activity) <= 1.5,
        ),
    ]
    judged = [
        claim("node perturbation: test accuracy at least 95 %", units, units >= 95, "node perturbation"),
        claim("SPSA: test accuracy below 95 %", weights, weights < 95, "SPSA"),
        *(claim(*each) for each in stated),
    ]
    for inputs in ("centred", "raw"):
        name = f"SPSA, {inputs}"
        statement = f"on {inputs} pixels, too, SPSA stays below 95 %"
        judged.append(claim(statement, mean[name], mean[name] < 95, name, asserted=False))
        ahead = mean[f"backprop, {inputs}"] - mean[f"node perturbation, {inputs}"]
        statement = f"on {inputs} pixels, too, backprop is at least as accurate as node perturbation (points)"
        judged.append(claim(statement, ahead, ahead >= 0, asserted=False))
    for inputs in ("", ", raw"):
        plain, matrix = f"node perturbation{inputs}", f"node perturbation + decorrelation{inputs}"
        gained = mean[matrix] - mean[plain]
        statement = f"decorrelation helps {plain} (points gained)"
        judged.append(claim(statement, gained, gained > 0, asserted=False))
    return judged
