"""The digits panel: every route from the same weights, on the same images in the same order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import thalweg as tw
from thalweg.data import Classification
from thalweg.equilibria import Implicit, Nudged, OneStep
from thalweg.ledger import cost
from thalweg.recipes.p07_equilibrium_propagation.routes import (
    CENTERED,
    NUDGED,
    STRENGTH,
    Coupled,
    Route,
    Training,
    make,
    routes,
)
from thalweg.step import Backprop, Step

WATCHED: Mapping[str, Route] = {
    "centred": Route("", Nudged(STRENGTH, "centered", steps=NUDGED)),
    "holomorphic": Route("", Nudged(STRENGTH, "holomorphic", steps=NUDGED)),
    "positive": Route("", Nudged(STRENGTH, "positive", steps=NUDGED)),
    "negative": Route("", Nudged(STRENGTH, "negative", steps=NUDGED)),
    "coupled": Route("", Coupled(STRENGTH)),
    "last steps": Route("", Backprop(), last=NUDGED),
    "one step": Route("", OneStep()),
}
"""The gradients that are compared with the implicit one along a training."""
WATCHED_EXAMPLES = 200


def train(
    route: Route,
    data: Classification,
    *,
    hidden: int,
    epochs: int,
    batch: int,
    seed: int,
    tick: Callable[[], Any],
    watch: Callable[[Training], None] | None = None,
) -> dict[str, Any]:
    """Train a route and judge it on the test images.

    Args:
        route: which.
        data: the images; the route may spoil them.
        hidden: units of the hidden layer.
        epochs: passes over the images, of a route of equal steps.
        batch: images a step.
        seed: names weights, order and spoiling.
        tick: called once per epoch, of a route of equal steps.
        watch: called after each epoch.

    Returns:
        `accuracy` on the test images in per cent, of the weights after the epoch of least training loss, and
        `last_accuracy` after the last epoch, where the loss may just have jumped; `loss` by epoch;
        `operations` and `kept` (bytes for backward) of one step; the number of `epochs` and `steps`.
    """
    data = spoiled(data, route.spoiled, seed)
    training = _made(route, data, hidden, seed)
    operations, kept = _cost(training, data, batch)
    if route.equal_operations:
        nudged = _cost(_made(_centered(), data, hidden, seed), data, batch)[0]
        epochs = max(epochs, round(epochs * nudged / operations))
    optimizer = torch.optim.Adam(training.parameters, route.rate)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    kept_weights = training.model.state_dict()
    for _ in range(epochs):
        total = torch.zeros((), device=data.train_inputs.device)
        parts = torch.randperm(len(data.train_labels), generator=order).split(batch)
        for rows in parts:
            optimizer.zero_grad()
            total += gradient(training, data.train_inputs[rows], data.train_labels[rows])
            optimizer.step()
        losses.append(float(total) / len(parts))
        if losses[-1] == min(losses):
            kept_weights = copy.deepcopy(training.model.state_dict())
        if watch is not None:
            watch(training)
        if not route.equal_operations:
            tick()
    last = _accuracy(training, data)
    training.model.load_state_dict(kept_weights)
    return {
        "accuracy": _accuracy(training, data),
        "last_accuracy": last,
        "loss": losses,
        "operations": operations,
        "kept": kept,
        "epochs": epochs,
        "steps": epochs * len(parts),
    }


def gradient(training: Training, x: Tensor, y: Any) -> Tensor:
    """Fill `.grad` by the route's own way, and return the mean cost."""
    found = training.closure(x, y)
    if isinstance(found, Tensor):
        return tw.backward(lambda: found, training.parameters)
    (phase,) = found
    loss: Tensor = phase.backward()
    return loss


def spoiled(data: Classification, how: str, seed: int) -> Classification:
    """The images with labels or pixels shuffled, or as they are."""
    draw = torch.Generator().manual_seed(seed)
    if how == "labels":
        order = torch.randperm(len(data.train_labels), generator=draw)
        return replace(data, train_labels=data.train_labels[order])
    if how == "pixels":
        shuffled = {
            name: images.gather(1, torch.rand(images.shape, generator=draw).argsort(1).to(images.device))
            for name in ("train_inputs", "test_inputs")
            for images in (getattr(data, name),)
        }
        return replace(data, **shuffled)
    return data


def watch_gradients(
    data: Classification, *, hidden: int, epochs: int, batch: int, seed: int, tick: Callable[[], Any]
) -> dict[str, list[list[float]]]:
    """Along a training by centred nudging: every gradient's cosine with the implicit one, link by link.

    Returns:
        By gradient, one row for each epoch, of one cosine for each link's weights.
    """
    x, y = data.train_inputs[:WATCHED_EXAMPLES], data.train_labels[:WATCHED_EXAMPLES]
    truth = Route("", Implicit("gmres", 1e-5, max_steps=1000))
    cosines: dict[str, list[list[float]]] = {name: [] for name in WATCHED}

    def weights(route: Route, of: Training) -> list[Tensor]:
        copy = _made(route, data, hidden, seed)
        copy.model.load_state_dict(of.model.state_dict())
        gradient(copy, x, y)
        return [p.grad.flatten() for p in copy.parameters if p.ndim > 1 and p.grad is not None]

    def watch(training: Training) -> None:
        wanted = weights(truth, training)
        for name, route in WATCHED.items():
            pairs = zip(weights(route, training), wanted, strict=True)
            cosines[name].append([float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs])

    train(_centered(), data, hidden=hidden, epochs=epochs, batch=batch, seed=seed, tick=tick, watch=watch)
    return cosines


def _centered() -> Route:
    return next(each for each in routes() if each.name == CENTERED)


def _accuracy(training: Training, data: Classification) -> float:
    answers = training.predict(data.test_inputs).argmax(1)
    return 100 * float((answers == data.test_labels).double().mean())


def _made(route: Route, data: Classification, hidden: int, seed: int) -> Training:
    training = make(route, data.train_inputs[0].numel(), hidden, data.classes, seed)
    training.model.to(data.train_inputs.device)
    return training


def _cost(training: Training, data: Classification, batch: int) -> tuple[int, int]:
    x, y = data.train_inputs[:batch], data.train_labels[:batch]
    found = cost(Step(training.model, lambda: training.closure(x, y), training.parameters), repeats=0)
    return found.operations, found.saved_bytes
