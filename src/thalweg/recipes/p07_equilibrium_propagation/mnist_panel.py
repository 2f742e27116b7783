"""The paper's own experiment, clipped units on 28 x 28 digits with remembered states, and its baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.data import Classification
from thalweg.equilibria import (
    EquilibriumPropagation,
    Nudged,
    SquaredError,
    convergent,
    dense_links,
    hopfield,
    unit_clip,
)
from thalweg.ledger import cost
from thalweg.recipes.p07_equilibrium_propagation.digits_panel import gradient
from thalweg.recipes.p07_equilibrium_propagation.routes import FeedForward, Training, settled
from thalweg.step import Backprop, Step

FREE, NUDGED, STRENGTH = 20, 4, 0.5
RATES = (0.1, 0.05)
"""Of the first and of the output link, as in the paper's code."""
TWIN_RATES = (0.05, 0.025)
"""The best of 0.1, 0.3, 0.5 and 1 times those, on held-out digits; for backpropagation through the relaxation
the best of 0.3, 1 and 3 times is 1."""
DECAY, DECAY_AFTER = 0.3, 4
"""The rates fall by this after so many epochs, to hold the gain."""


@dataclass(frozen=True, slots=True)
class MnistRoute:
    """One row of the panel.

    Args:
        name: in tables and figures.
        kind: "nudged" is equilibrium propagation with a random sign; "through time" backpropagation through
            the last steps of a relaxation of as many, with smooth units, since clipped ones get stuck;
            "feed-forward" the twin of the same parameters and backpropagation, with a linear output for the
            same reason.
        frozen: the first link never moves.
        equal_operations: as in `Route`.
        rates: of the two links.
    """

    name: str
    kind: Literal["nudged", "through time", "feed-forward"]
    frozen: bool = False
    equal_operations: bool = False
    rates: tuple[float, float] = RATES


NUDGED_ROW = "equilibrium propagation"
MNIST_ROUTES = (
    MnistRoute(NUDGED_ROW, "nudged"),
    MnistRoute(f"backprop through the last {NUDGED} steps", "through time"),
    MnistRoute("feed-forward backprop, equal steps", "feed-forward", rates=TWIN_RATES),
    MnistRoute(
        "feed-forward backprop, equal operations", "feed-forward", equal_operations=True, rates=TWIN_RATES
    ),
    MnistRoute("control: output link alone", "nudged", frozen=True),
)


def train_mnist(
    route: MnistRoute,
    data: Classification,
    *,
    hidden: int,
    epochs: int,
    batch: int,
    seed: int,
    tick: Callable[[], Any],
) -> dict[str, Any]:
    """Train one row by plain stochastic gradient descent.

    Returns:
        `test_error` and `train_error` by epoch in per cent, at `at`, the epochs counted in those of the
        nudged row where operations are equal; `operations` and `kept` of one step; `epochs`.
    """
    training = _make(route, data, hidden, batch, seed)
    operations, kept = _cost(training, data, batch)
    rounds = epochs
    if route.equal_operations:
        other = _cost(_make(MNIST_ROUTES[0], data, hidden, batch, seed), data, batch)[0]
        rounds = max(epochs, round(epochs * other / operations))
    optimizer = torch.optim.SGD(_groups(training.model, route.rates))
    order = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"test_error": [], "train_error": [], "at": []}
    for epoch in range(rounds):
        if epoch == round(rounds * DECAY_AFTER / max(epochs, DECAY_AFTER + 1)):
            for group in optimizer.param_groups:
                group["lr"] *= DECAY
        for rows in torch.randperm(len(data.train_labels), generator=order).split(batch):
            optimizer.zero_grad()
            gradient(training, data.train_inputs[rows], (data.train_labels[rows], rows))
            optimizer.step()
        for part in ("train", "test"):
            found[f"{part}_error"].append(_error(training, data, part))
        found["at"].append((epoch + 1) * epochs / rounds)
        tick()
    return {**found, "operations": operations, "kept": kept, "epochs": rounds}


def _make(route: MnistRoute, data: Classification, hidden: int, batch: int, seed: int) -> Training:
    links = dense_links([data.train_inputs.shape[1], hidden, data.classes], seed=seed)
    device = data.train_inputs.device
    price = SquaredError(1.0)
    if route.kind == "feed-forward":
        twin = FeedForward(links, (unit_clip, nn.Identity())).to(device)
        return Training(twin, lambda x, y: price(twin(x), y[0]), twin, tuple(twin.parameters()))
    if route.kind == "through time":
        network = convergent(links).to(device)

        def losses(x: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
            rest = settled(network, x, FREE - NUDGED)
            output = network(x, gradient=Backprop(), states=rest, tolerance=None, max_steps=NUDGED)
            found: Tensor = price(output, y[0])
            return found

        return Training(network, losses, lambda x: settled(network, x, FREE)[-1], tuple(network.parameters()))
    network = hopfield(links).to(device)
    network.links[0].requires_grad_(not route.frozen)
    policy = Nudged(STRENGTH, "random", steps=NUDGED)
    learner = EquilibriumPropagation(
        network, price, gradient=policy, steps=FREE, remember=len(data.train_labels)
    ).to(device)
    return Training(learner, lambda x, y: learner.phases((x, *y)), learner.predict, learner.learned())


def _groups(model: nn.Module, rates: tuple[float, float]) -> list[dict[str, Any]]:
    links = model.network.links if isinstance(model, EquilibriumPropagation) else model.links
    assert isinstance(links, nn.ModuleList)
    groups = [
        {"params": [p for p in link.parameters() if p.requires_grad], "lr": rate}
        for link, rate in zip(links, rates, strict=True)
    ]
    return [group for group in groups if group["params"]]


def _cost(training: Training, data: Classification, batch: int) -> tuple[int, int]:
    rows = torch.arange(min(batch, len(data.train_labels)))
    x, y = data.train_inputs[rows], (data.train_labels[rows], rows)
    found = cost(Step(training.model, lambda: training.closure(x, y), training.parameters), repeats=0)
    return found.operations, found.saved_bytes


def _error(training: Training, data: Classification, part: str) -> float:
    inputs, labels = getattr(data, f"{part}_inputs"), getattr(data, f"{part}_labels")
    with torch.no_grad():
        answers = torch.cat([training.predict(x).argmax(1) for x in inputs.split(1000)])
    return 100 * float((answers != labels).double().mean())
