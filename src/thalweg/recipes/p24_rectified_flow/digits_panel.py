"""Digits by their label: what a classifier of real digits says of those made in 1, 2, 4 and 100 steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.data import Classification, digits
from thalweg.flows import (
    Coupling,
    Euler,
    Field,
    Independent,
    Straight,
    energy_distance,
    follow,
    reflow,
    sample,
)
from thalweg.noise import Key, normal
from thalweg.recipes.p24_rectified_flow.judging import euler_times, rounded
from thalweg.recipes.p24_rectified_flow.training import copy_of, fit

STEPS = (1, 2, 4, 100)
AGAIN = "flow 1, trained again"
"""The control: flow 1, trained on independent pairs for as many further updates as flow 2 on its own."""
_SOURCE, _JUDGED = 300, 400


@dataclass(frozen=True, slots=True)
class DigitsTraining:
    """How the digits' flows are trained.

    Args:
        width: of the network.
        blocks: of the network.
        updates: of each flow.
        batch: images in one of them.
        learning_rate: of Adam at the beginning; it falls to 0 along a cosine.
        pairs: that are simulated for a reflow, in 100 Euler steps.
        judged: images that a flow is judged on.
    """

    width: int = 128
    blocks: int = 2
    updates: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3
    pairs: int = 10_000
    judged: int = 1000


class DigitNetwork(nn.Module):
    """Residual blocks on the pixels, each told the time and the label.

    Args:
        width: units between the blocks.
        blocks: how many.
        classes: number of labels.
    """

    frequencies: Tensor

    def __init__(self, width: int, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1.0, 9.0))
        self.label = nn.Embedding(classes, width)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Linear(width, 64)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """The velocity at images (batch, 64), times (batch,) and labels (batch,)."""
        angles = t[:, None].to(x) * self.frequencies
        told = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label)
        state = self.first(x)
        for block in self.blocks:
            state = state + block(state + told)
        return self.last(state)  # type: ignore[no-any-return]


def digit_flows(training: DigitsTraining, rounds: int, seed: int, device: str) -> dict[str, Any]:
    """Train flow 1 from noise to digits, reflow it, and judge all flows and one with more training.

    Returns:
        `flows` (name to what `_judged` says), `real` (the classifier on real test digits), `floor` (the
        energy distance between training and test digits), `parameters` (of a flow).
    """
    data = digits()
    images, labels = (2 * data.train_inputs - 1).to(device), data.train_labels.to(device)
    classifier, accuracy = _classifier(data, device)
    points = Independent(images, None, {"label": labels})
    network = DigitNetwork(training.width, training.blocks).to(device)

    def learn(field: Field, pairs: Coupling) -> Field:
        fitted, _ = fit(
            field,
            pairs,
            updates=training.updates,
            batch=training.batch,
            learning_rate=training.learning_rate,
            seed=seed,
        )
        return fitted

    first = learn(Field(network, Straight()), points)
    source = normal(torch.empty(training.pairs, 64, device=device), Key(seed, 0, _SOURCE))
    wanted = {"label": labels[torch.arange(training.pairs, device=device) % len(labels)]}
    straighter = reflow(
        first, source, learn, euler_times(100), rounds=rounds, solver=Euler(), conditions=wanted
    )
    fields = {f"flow {index + 1}": field for index, field in enumerate([first, *straighter])}
    fields[AGAIN] = learn(copy_of(first), points)
    test = (2 * data.test_inputs - 1).to(device)
    return {
        "flows": {name: _judged(field, classifier, test, training, seed) for name, field in fields.items()},
        "real": accuracy,
        "floor": float(energy_distance(images, test)),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


def _classifier(data: Classification, device: str) -> tuple[nn.Module, float]:
    """A small network trained on real digits, and its accuracy in per cent on those held out."""
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, data.classes)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    images, labels = (2 * data.train_inputs - 1).to(device), data.train_labels.to(device)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network, _accuracy(network, (2 * data.test_inputs - 1).to(device), data.test_labels.to(device))


@torch.no_grad()
def _accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * float((classifier(images).argmax(1) == labels).double().mean())


def _judged(
    field: Field, classifier: nn.Module, test: Tensor, training: DigitsTraining, seed: int
) -> dict[str, Any]:
    """By number of Euler steps: `accuracy` in per cent, energy `distance` from test digits, some `images`."""
    source = normal(torch.empty(training.judged, 64, device=test.device), Key(seed, 0, _JUDGED))
    labels = torch.arange(training.judged, device=test.device) % 10
    flow = follow(field, source, euler_times(100), solver=Euler(), conditions={"label": labels})
    found: dict[str, Any] = {"straightness": float(flow.straightness().mean())}
    for name in ("accuracy", "distance", "images"):
        found[name] = {}
    for steps in STEPS:
        with torch.no_grad():
            made = sample(field, source, euler_times(steps), solver=Euler(), conditions={"label": labels})
        found["accuracy"][str(steps)] = _accuracy(classifier, made, labels)
        found["distance"][str(steps)] = float(energy_distance(made, test))
        found["images"][str(steps)] = rounded(made[:10])
    return found
