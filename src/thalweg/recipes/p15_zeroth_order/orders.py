"""Digits learned by rules of falling order: backprop, noise on units, noise on weights."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import thalweg as tw
from thalweg.data import Classification, digits
from thalweg.lab import Claim

Inputs = Literal["standardised", "centred", "raw"]
WIDTH = 64
BATCH = 64
HELD_OUT = 0.2


@dataclass(frozen=True, slots=True)
class Order:
    """A row of the panel.

    Args:
        name: in tables and figures.
        rule: fills `.grad`.
        learning_rates: the grid of three from which held-out training data choose.
        inputs: how the pixels are prepared.
        decorrelation: rate of the decorrelating matrix before each layer; None for no such matrix.
        learning_rate_of: the row whose step size this one takes over, in place of a choice of its own.
    """

    name: str
    rule: tw.Rule
    learning_rates: tuple[float, ...]
    inputs: Inputs = "standardised"
    decorrelation: float | None = None
    learning_rate_of: str | None = None


def orders() -> tuple[Order, ...]:
    """The rows: backprop first, controls of the preparation last."""
    weights, units = (0.001, 0.003, 0.01), (0.01, 0.03, 0.1)
    gaussian, nodes = tw.SPSA(directions="gaussian"), tw.NodePerturbation()
    activity = tw.NodePerturbation(mode="activity")
    return (
        Order("backprop", tw.Backprop(), (0.03, 0.1, 0.3)),
        Order("activity-difference perturbation", activity, units),
        Order("node perturbation", nodes, units),
        Order("node perturbation + decorrelation", nodes, units, decorrelation=0.01),
        Order("SPSA", gaussian, weights),
        Order("SPSA, Rademacher", tw.SPSA(directions="rademacher"), weights),
        Order("SPSA, 4 samples", tw.SPSA(directions="gaussian", samples=4), weights),
        Order(
            "forward gradient",
            tw.ForwardGradient(directions="gaussian"),
            weights,
            learning_rate_of="SPSA",
        ),
        Order("backprop, centred inputs", tw.Backprop(), (0.03, 0.1, 0.3), "centred"),
        Order("node perturbation, centred inputs", nodes, units, "centred"),
        Order("SPSA, centred inputs", gaussian, weights, "centred"),
        Order("node perturbation, raw inputs", nodes, units, "raw"),
        Order("node perturbation + decorrelation, raw inputs", nodes, units, "raw", 0.01),
        Order("SPSA, raw inputs", gaussian, weights, "raw"),
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


def train(order: Order, data: Classification, *, learning_rate: float, steps: int, seed: int) -> nn.Module:
    """Plain gradient descent at a constant step size; a run that leaves the finite numbers ends there."""
    model = network(seed, order.decorrelation)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(data.train_labels), (BATCH,), generator=generator)
        x, y = data.train_inputs[chosen], data.train_labels[chosen]

        def losses(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y, reduction="none")

        optimizer.zero_grad()
        try:
            tw.backward(losses, weights, gradient=order.rule, key=tw.Key(seed, step))
        except tw.errors.NonFiniteError:
            break
        optimizer.step()
    return model


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Right answers in percent."""
    model.eval()
    with torch.no_grad():
        right = model(inputs).argmax(dim=1) == labels
    return 100 * float(right.float().mean())


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
    """Test accuracy after training on all training digits."""
    data = prepared(order.inputs)
    model = train(order, data, learning_rate=learning_rate, steps=steps, seed=seed)
    return {"accuracy": accuracy(model, data.test_inputs, data.test_labels)}


def price(order: Order) -> dict[str, Any]:
    """What one step of the row costs, counted."""
    data, model = prepared(order.inputs), network(0, order.decorrelation)
    x, y = data.train_inputs[:BATCH], data.train_labels[:BATCH]
    step = (model, lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), model.parameters())
    found = tw.cost(step, gradient=order.rule, repeats=0)
    return {
        "evaluations": found.evaluations,
        "operations": found.operations,
        "saved_bytes": found.saved_bytes,
    }


def claims(found: Mapping[str, Sequence[float]], *, decisive: bool) -> list[Claim]:
    """What must hold of the rows at equal steps; `found` holds test accuracies by row, one for each seed."""
    mean = {name: statistics.fmean(values) for name, values in found.items()}
    exact, units, activity = (
        mean["backprop"],
        mean["node perturbation"],
        mean["activity-difference perturbation"],
    )
    weights, forward = mean["SPSA"], mean["forward gradient"]

    def claim(statement: str, measured: float, row: str | None, holds: bool, known: str) -> Claim:
        values = found[row] if row is not None else ()
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Claim(statement, known, measured, spread, holds if decisive else None, asserted=decisive)

    source = "the review gives no number"
    return [
        claim(
            "backprop is at least as accurate as node perturbation (points ahead)",
            exact - units,
            None,
            exact >= units,
            source,
        ),
        claim(
            "node perturbation: test accuracy at least 95 %", units, "node perturbation", units >= 95, source
        ),
        claim("SPSA: test accuracy below 95 %", weights, "SPSA", weights < 95, source),
        claim(
            "node perturbation is at least 2 points ahead of SPSA",
            units - weights,
            None,
            units - weights >= 2,
            source,
        ),
        claim(
            "forward gradient and central SPSA differ by at most 2 points at equal step size",
            abs(forward - weights),
            None,
            abs(forward - weights) <= 2,
            "equal as the scale goes to 0 (section on forward gradients)",
        ),
        claim(
            "activity-difference perturbation is within 1.5 points of backprop (points behind)",
            exact - activity,
            None,
            abs(exact - activity) <= 1.5,
            source,
        ),
    ]
