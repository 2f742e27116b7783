"""Convolutions in the fast simulation: centred against positive nudging and truncated backprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from thalweg.data import Classification, cifar10, digits, fashion_mnist
from thalweg.equilibria import EquilibriumPropagation, Nudged, SquaredError, conv_links, even_odd
from thalweg.recipes.p07_equilibrium_propagation.digits_panel import gradient
from thalweg.recipes.p07_equilibrium_propagation.routes import Training
from thalweg.step import Backprop

STRENGTH, NUDGED = 0.25, 15
RATES = (0.0625, 0.0375, 0.025, 0.02, 0.0125)
MOMENTUM, DECAY, GAIN, LAST_RATE = 0.9, 3e-4, 0.5, 2e-6
ImageRoute = Literal["centred nudging", "positive nudging", "truncated backprop"]
CENTRED, POSITIVE, TRUNCATED = IMAGE_ROUTES = ("centred nudging", "positive nudging", "truncated backprop")


def load_images(name: str) -> Classification:
    """The images by name, in squares of 8 or 32 pixels: "cifar10", "fashion_mnist" or "digits"."""
    if name == "cifar10":
        return cifar10()
    data = fashion_mnist() if name == "fashion_mnist" else digits()

    def square(images: Tensor) -> Tensor:
        side = round(images.shape[1] ** 0.5)
        edge = (32 - side) // 2 if side > 8 else 0
        return torch.nn.functional.pad(images.reshape(-1, 1, side, side), [edge] * 4)

    return Classification(
        square(data.train_inputs),
        data.train_labels,
        square(data.test_inputs),
        data.test_labels,
        data.classes,
        data.name,
    )


def train_images(
    route: str,
    data: Classification,
    *,
    width: int,
    free: int,
    epochs: int,
    batch: int,
    seed: int,
    device: torch.device,
    tick: Callable[[], Any],
) -> dict[str, Any]:
    """Train one route; the free state of a batch starts from that of the last one, as in the paper.

    Args:
        route: one of `IMAGE_ROUTES`.
        data: images in squares.
        width: channels of the first layer.
        free: steps of the free relaxation.
        epochs: passes over the data, without what is left of the last batch.
        batch: images a step.
        seed: names weights and order.
        device: where to compute.
        tick: called once per epoch.

    Returns:
        `test_error` by epoch in per cent.
    """
    training = _make(route, data, width, free, batch, seed, device)
    x, y = data.train_inputs.to(device), data.train_labels.to(device)
    parameters = list(training.parameters)
    rates = RATES[-(len(parameters) // 2) :]
    groups = [
        {"params": pair, "lr": rate}
        for pair, rate in zip(zip(parameters[::2], parameters[1::2]), rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=DECAY)
    steps = epochs * (len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LAST_RATE)
    order = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(epochs):
        rows = torch.randperm(len(y), generator=order).to(device)
        for part in rows[: len(y) // batch * batch].split(batch):
            optimizer.zero_grad()
            gradient(training, x[part], y[part])
            optimizer.step()
            schedule.step()
        answers = torch.cat(
            [training.predict(part.to(device)).argmax(1).cpu() for part in data.test_inputs.split(500)]
        )
        errors.append(100 * float((answers != data.test_labels).double().mean()))
        tick()
    return {"test_error": errors}


def _make(
    route: str, data: Classification, width: int, free: int, batch: int, seed: int, device: torch.device
) -> Training:
    shape = data.train_inputs.shape[1:]
    large = shape[-1] == 32
    wide = [width, 2 * width, 4 * width, 4 * width] if large else [width, 2 * width]
    paddings = [1, 1, 1, 0] if large else [1, 1]
    features = wide[-1] if large else wide[-1] * 4
    links = conv_links([shape[0], *wide], paddings, features, data.classes, gain=GAIN, seed=seed)
    network = even_odd(links, input_shape=shape).to(device)
    form: Literal["centered", "positive"] = "positive" if route == POSITIVE else "centered"
    slots = torch.arange(batch, device=device)
    learner = EquilibriumPropagation(
        network,
        SquaredError(),
        gradient=Nudged(STRENGTH, form, steps=NUDGED),
        steps=free,
        remember=batch,
    ).to(device)
    parameters = learner.learned()
    if route != TRUNCATED:
        return Training(learner, lambda x, y: learner.phases((x, y, slots)), learner.predict, parameters)
    kept = [network.zeros(data.train_inputs[:batch].to(device))]

    def losses(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            kept[0] = network.relax(network.drive(x), kept[0], free).state
        output = network(x, gradient=Backprop(), states=kept[0], tolerance=None, max_steps=NUDGED)
        price: Tensor = learner.cost(output, y)
        return price

    return Training(learner, losses, learner.predict, parameters)
