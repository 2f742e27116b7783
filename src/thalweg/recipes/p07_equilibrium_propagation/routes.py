"""The ways to train one small network that are held against each other, and the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.equilibria import (
    CoupledLearning,
    EnergyNetwork,
    EquilibriumPropagation,
    Implicit,
    Nudged,
    OneStep,
    SquaredError,
    convergent,
    dense_links,
    hopfield,
    scaled_sigmoid,
)
from thalweg.step import Backprop

FREE, NUDGED, STRENGTH = 30, 10, 0.2
"""Steps of the free and of each nudged relaxation, and the nudge: of the sigmoid network."""
CLIPPED_FREE, CLIPPED_NUDGED, CLIPPED_STRENGTH = 20, 4, 0.5
"""The same of the original paper's clipped units."""

TWIN_RATE = 1e-2
"""The best for the feed-forward twin, of 3e-4, 1e-3, 3e-3, 1e-2 and 3e-2 on held-out digits, at equal steps
and at equal operations; the others share one rate, so that they differ in their gradients alone."""

Rule = Nudged | Backprop | Implicit | OneStep
Closure = Callable[[Tensor, Any], Any]


@dataclass(frozen=True, slots=True)
class Coupled:
    """Coupled learning, as a field of a route.

    Args:
        strength: see `thalweg.equilibria.CoupledLearning`.
        form: likewise.
    """

    strength: float
    form: Literal["positive", "negative", "centered"] = "centered"


@dataclass(frozen=True, slots=True)
class Route:
    """One way to train the network.

    Args:
        name: in tables and figures.
        rule: how the gradient is found; None for backpropagation in a feed-forward network of the same
            parameters.
        layer: a `Nudged` rule serves as the backward of an ordinary layer, under a loss behind it, and does
            not nudge by the cost itself.
        last: differentiate the last so many steps only; None for all.
        clipped: the original paper's units instead of sigmoids.
        frozen: "hidden" or "output": the link whose weights never move; "" for none.
        spoiled: "labels" gives each training image another one's label, "pixels" shuffles each image's
            pixels by a permutation of its own, in training and test; "" for neither.
        equal_operations: train for as many operations as centred nudging takes, instead of as many steps.
        rate: of Adam.
    """

    name: str
    rule: Rule | Coupled | None
    layer: bool = False
    last: int | None = None
    clipped: bool = False
    frozen: Literal["", "hidden", "output"] = ""
    spoiled: Literal["", "labels", "pixels"] = ""
    equal_operations: bool = False
    rate: float = 1e-3

    @property
    def control(self) -> bool:
        """Whether it is there to fail."""
        return bool(self.frozen or self.spoiled)


CENTERED, THROUGH_TIME = "centred nudging", "backprop through time"
TWIN, TWIN_LONGER = "feed-forward backprop, equal steps", "feed-forward backprop, equal operations"


def routes() -> tuple[Route, ...]:
    """Nudging in all its forms, what knows the derivatives, the feed-forward twin, and the controls."""
    centered = Nudged(STRENGTH, "centered", steps=NUDGED)
    return (
        Route(CENTERED, centered),
        Route("positive nudging", Nudged(STRENGTH, "positive", steps=NUDGED)),
        Route("negative nudging", Nudged(STRENGTH, "negative", steps=NUDGED)),
        Route("random-sign nudging", Nudged(STRENGTH, "random", steps=NUDGED)),
        Route("holomorphic nudging, 4 points", Nudged(STRENGTH, "holomorphic", steps=NUDGED)),
        Route("centred, as a layer's backward", centered, layer=True),
        Route("coupled learning, centred", Coupled(STRENGTH)),
        Route("contrastive learning", Coupled(1.0, "positive")),
        Route(THROUGH_TIME, Backprop()),
        Route(f"backprop through the last {NUDGED} steps", Backprop(), last=NUDGED),
        Route("implicit gradient", Implicit(tolerance=1e-4, max_steps=1000)),
        Route("backprop through one step", OneStep()),
        Route(TWIN, None, rate=TWIN_RATE),
        Route(TWIN_LONGER, None, equal_operations=True, rate=TWIN_RATE),
        Route(
            "clipped units, random sign",
            Nudged(CLIPPED_STRENGTH, "random", steps=CLIPPED_NUDGED),
            clipped=True,
        ),
        Route("clipped units, through time", Backprop(), clipped=True),
        Route("control: output link alone", centered, frozen="hidden"),
        Route("control: first link alone", centered, frozen="output"),
        Route("control: pixels shuffled", centered, spoiled="pixels"),
        Route("control: labels shuffled", centered, spoiled="labels"),
    )


class FeedForward(nn.Module):
    """The links of an energy network, run through once: the twin with the same parameters.

    Args:
        links: from the input up.
        activations: of each layer.
    """

    def __init__(self, links: list[nn.Module], activations: tuple[Callable[[Tensor], Tensor], ...]) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        """The output layer, shape (batch, classes)."""
        for link, activation in zip(self.links, self.activations, strict=True):
            x = activation(link(x))
        return x


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """A route made ready to train.

    Args:
        model: holds the parameters.
        closure: takes inputs and labels (with indices, where a learner remembers); returns the phases of a
            learner, or losses per example.
        predict: the outputs by which it is judged.
        parameters: what is learned.
    """

    model: nn.Module
    closure: Closure
    predict: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]


def make(route: Route, inputs: int, hidden: int, classes: int, seed: int) -> Training:
    """The network of a route, with weights that the seed names, and how to take its gradient."""
    links = dense_links([inputs, hidden, classes], gain=None if route.clipped else 1.0, seed=seed)
    price = SquaredError(1.0 if route.clipped else 0.5)
    if route.rule is None:
        twin = FeedForward(links, (scaled_sigmoid, scaled_sigmoid))
        return Training(twin, lambda x, y: price(twin(x), y), twin, tuple(twin.parameters()))
    network = hopfield(links) if route.clipped else convergent(links)
    if route.frozen:
        network.links[0 if route.frozen == "hidden" else 1].requires_grad_(False)
    free = CLIPPED_FREE if route.clipped else FREE
    learner = _learner(route, network, price, free)
    parameters = tuple(p for p in network.parameters() if p.requires_grad)
    predict = learner.predict if learner is not None else lambda x: settled(network, x, free)[-1]
    if learner is not None:
        return Training(network, lambda x, y: learner.phases((x, y)), predict, parameters)
    return Training(network, lambda x, y: price(_output(route, network, x, free), y), predict, parameters)


def _learner(
    route: Route, network: EnergyNetwork, price: SquaredError, free: int
) -> EquilibriumPropagation | CoupledLearning | None:
    rule = route.rule
    if isinstance(rule, Coupled):
        return CoupledLearning(
            network, price, strength=rule.strength, form=rule.form, clamped_steps=NUDGED, steps=free
        )
    if isinstance(rule, Nudged) and not route.layer:
        return EquilibriumPropagation(network, price, gradient=rule, steps=free)
    return None


def _output(route: Route, network: EnergyNetwork, x: Tensor, free: int) -> Tensor:
    """The output layer at rest, differentiated by the route's policy."""
    assert route.rule is None or not isinstance(route.rule, Coupled)
    if route.last is None:
        whole: Tensor = network(x, gradient=route.rule, tolerance=None, max_steps=free)
        return whole
    rest = settled(network, x, free - route.last)
    output: Tensor = network(x, gradient=route.rule, states=rest, tolerance=None, max_steps=route.last)
    return output


def settled(network: EnergyNetwork, x: Tensor, steps: int) -> tuple[Tensor, ...]:
    """The state after so many free steps from zeros, without a graph."""
    with torch.no_grad():
        return network.relax(network.drive(x), network.zeros(x), steps).state
