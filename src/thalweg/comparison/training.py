"""Train a network by a route: the same data order, steps and initial weights for each."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.borrowed import isolated
from thalweg.data import Classification
from thalweg.errors import NonFiniteError
from thalweg.noise import Key, normal
from thalweg.step import Backprop, Closure, Estimate, Rule, backward

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""The grid that every route chooses from, by its accuracy on held-out training data."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to learn a task.

    Args:
        name: as on the command line and in the table.
        network: the name of the network, which says which routes may be held against each other.
        reference: the route whose gradient is this network's exact one.
        needs: what the route asks of the computation, for the table.
        build: makes the untrained network from the numbers of inputs and classes.
        rule: fills `.grad`.
        unbiased: whether the mean of its gradient must be the exact one.
        control: whether the row is there to be beaten.
        learner: whether it has no global backward; it is then trained at equal operations, too.
        other_objective: whether it does not follow the gradient of its reference's loss, so that none is
            held against the other.
    """

    name: str
    network: str
    reference: str
    needs: str
    build: Callable[[int, int], nn.Module]
    rule: Rule
    unbiased: bool = False
    control: bool = False
    learner: bool = False
    other_objective: bool = False


@dataclass(frozen=True, slots=True)
class NoiseOfEqualNorm:
    """A control that must learn nothing: random directions, each as long as the exact gradient."""

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """The norms of backprop, the direction of noise."""
        exact = Backprop().estimate(closure, parameters, key)
        noise: list[Tensor | None] = []
        for index, gradient in enumerate(exact.gradients):
            if gradient is None:
                noise.append(None)
                continue
            direction = normal(gradient, key.at(call=index))
            noise.append(direction * (gradient.norm() / direction.norm()))
        return Estimate(exact.loss, tuple(noise), exact.evaluations)


def initial_network(route: Route, data: Classification, seed: int, device: str) -> nn.Module:
    """The untrained network of a route: the same weights for all routes of a network and a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = route.build(data.train_inputs[0].numel(), data.classes)
    return network.to(device)


def train(
    route: Route,
    data: Classification,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    batch: int,
    device: str,
) -> nn.Module:
    """Train by Adam with a linearly falling step size; the order of the data depends on the seed alone.

    Raises:
        NonFiniteError: the loss or a gradient left the finite numbers.
    """
    network = initial_network(route, data, seed, device)
    inputs, labels = data.train_inputs.to(device), data.train_labels.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    # a rule with a baseline learns: every training begins with one that has seen nothing
    rule = copy.deepcopy(route.rule)
    order = torch.Generator().manual_seed(seed)
    network.train()
    for step in range(steps):
        chosen = torch.randint(len(inputs), (batch,), generator=order)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        closure = _losses(network, inputs[chosen], labels[chosen])
        if route.learner:
            _learn(closure())
        else:
            backward(closure, network.parameters(), gradient=rule, key=Key(seed, step))
        optimizer.step()
    return network


def _learn(found: Any) -> None:
    """Fill `.grad` as the learner does: by its phases, or from losses whose gradient it has changed."""
    if isinstance(found, Tensor):
        found.mean().backward()
        return
    for phase in found:
        phase.backward()


def _losses(network: nn.Module, inputs: Tensor, labels: Tensor) -> Closure:
    losses: Callable[[Tensor, Tensor], Tensor] = network.losses  # type: ignore[assignment]
    return lambda: losses(inputs, labels)


@torch.no_grad()
def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers in evaluation mode, in [0, 1]; the network is left as it was."""
    device = next(network.parameters()).device
    with isolated(network, []):
        network.eval()
        right = network(inputs.to(device)).argmax(dim=1) == labels.to(device)
    return float(right.float().mean())


def choose_learning_rate(
    route: Route, data: Classification, *, steps: int, seed: int, batch: int, device: str
) -> tuple[float, dict[str, float]]:
    """The step size of the shared grid with the best accuracy on held-out training data.

    The two best of a first seed meet again on a second, so that no step size wins by one lucky start.

    Returns:
        The step size, and each one's mean held-out accuracy; a diverged run counts 0.
    """
    fit, held_out = data.split_train(fraction=0.2, seed=seed)

    def score(rate: float, each: int) -> float:
        try:
            network = train(
                route, fit, learning_rate=rate, steps=steps, seed=each, batch=batch, device=device
            )
        except NonFiniteError:
            return 0.0
        return accuracy(network, held_out.train_inputs, held_out.train_labels)

    scores = {rate: score(rate, seed) for rate in LEARNING_RATES}

    def best_first(rates: Iterable[float]) -> list[float]:
        # of equally good step sizes the smallest
        return sorted(rates, key=lambda rate: (-scores[rate], rate))

    finalists = best_first(LEARNING_RATES)[:2]
    for rate in finalists:
        scores[rate] = statistics.fmean((scores[rate], score(rate, seed + 1)))
    return best_first(finalists)[0], {str(rate): value for rate, value in scores.items()}
