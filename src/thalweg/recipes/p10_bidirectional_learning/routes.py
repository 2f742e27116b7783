"""The networks of the recipe, and their training in one direction or both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.data import Classification
from thalweg.local import Adversarial, Bidirectional, BidirectionalNet, bidirectional_mlp
from thalweg.local.stack import LocalPhase

Net = Literal["linear", "hybrid", "convolutions"]
LOOKS = 16
"""How often in a training the held-out accuracy is measured."""
HELD_OUT = 12
"""One of so many training images is held out, to choose the step that is kept."""


@dataclass(frozen=True, slots=True)
class Route:
    """One row.

    Args:
        name: in tables and figures.
        net: "linear": no hidden layer. "hybrid": one of 128 units, whose generator faces a discriminator.
            "convolutions": two and a layer of 1024, likewise.
        backward: the share of the steps that have a backward direction too, 0 to 1.
        shuffled: the backward direction is told another image's class, for a control.
    """

    name: str
    net: Net
    backward: float
    shuffled: bool = False


BACKPROP, BOTH = "linear, backprop", "linear, bidirectional"
LINEAR = (
    Route(BACKPROP, "linear", 0.0),
    Route(BOTH, "linear", 1.0),
    Route("linear, bidirectional, then backprop", "linear", 0.5),
    Route("control: linear, bidirectional with shuffled classes", "linear", 1.0, shuffled=True),
)
HYBRID = (Route("hidden layer, backprop", "hybrid", 0.0), Route("hidden layer, hybrid", "hybrid", 1.0))
CONVOLUTIONS = (
    Route("convolutions, backprop", "convolutions", 0.0),
    Route("convolutions, hybrid", "convolutions", 1.0),
)
RATES = {"linear": (3e-3, 3e-3), "hybrid": (2e-4, 1e-3), "convolutions": (2e-4, 1e-3)}
"""Of classifier (and discriminator) and of generator: the paper's."""
FIRST_MOMENT = {"linear": 0.9, "hybrid": 0.5, "convolutions": 0.5}


@dataclass(frozen=True, slots=True)
class Trained:
    """A net after training.

    Args:
        kept: as of the step of best held-out accuracy.
        last: as of the last step.
        step: which step was kept.
        held_out: its accuracy on held-out training images, in [0, 1].
    """

    kept: BidirectionalNet
    last: BidirectionalNet
    step: int
    held_out: float


def train(
    route: Route,
    data: Classification,
    *,
    width: int,
    steps: int,
    batch: int,
    seed: int,
    tick: Callable[[], Any],
) -> Trained:
    """Train one row without biases, each direction with an Adam of its own."""
    x, y = shaped(route.net, data.train_inputs), data.train_labels
    held = len(x) // HELD_OUT
    learner = make(route, x.shape[1:], data.classes, width, seed, round(route.backward * steps)).to(x.device)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    draw = torch.Generator().manual_seed(seed)
    best, best_step, kept = -1.0, 0, copy.deepcopy(learner.net)
    for step in range(1, steps + 1):
        rows = held + torch.randint(len(x) - held, (batch,), generator=draw).to(x.device)
        for phase in phases(learner, x[rows], y[rows], route.shuffled, step):
            if phase.name not in optimizers:
                rate = RATES[route.net][phase.name == "backward"]
                betas = (FIRST_MOMENT[route.net], 0.999)
                optimizers[phase.name] = torch.optim.Adam(phase.parameters, lr=rate, betas=betas)
            optimizers[phase.name].zero_grad()
            phase.backward()
            optimizers[phase.name].step()
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            found = accuracy(learner.net, x[:held], y[:held])
            if found > best:
                best, best_step, kept = found, step, copy.deepcopy(learner.net)
        tick()
    return Trained(kept.eval(), learner.net.eval(), best_step, best)


def phases(learner: Bidirectional, x: Tensor, y: Tensor, shuffled: bool, step: int) -> Iterable[LocalPhase]:
    """The phases of one batch; shuffled, the backward direction hears the classes of other images."""
    if not shuffled:
        return learner.phases((x, y))
    forward = next(iter(learner.phases((x, y))))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(step)).to(y.device)
    other = iter(learner.phases((x, y[order])))
    next(other)
    return [forward, *other]


def make(
    route: Route, shape: Iterable[int], classes: int, width: int, seed: int, backward_steps: int
) -> Bidirectional:
    """The learner of a route."""
    shape = list(shape)
    if route.net == "linear":
        net = bidirectional_mlp([*shape, classes], seed=seed)
        return Bidirectional(net, bias=False, stop_backward_after=backward_steps)
    if route.net == "hybrid":
        net = bidirectional_mlp([*shape, width, classes], nn.ReLU, std=None, seed=seed)
        torch.manual_seed(seed)
        judge: nn.Module = nn.Sequential(nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, 1))
    else:
        net = BidirectionalNet(_convolutions(shape, classes, width), shape).start_(std=0.02, seed=seed)
        torch.manual_seed(seed)
        judge = nn.Sequential(*_convolutions(shape, 1, width))
    return Bidirectional(net, backward=Adversarial(judge), bias=False, stop_backward_after=backward_steps)


def _convolutions(shape: list[int], outputs: int, width: int) -> list[nn.Module]:
    side = shape[-1] // 4
    return [
        nn.Conv2d(shape[0], width // 2, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
        nn.BatchNorm2d(width, momentum=0.1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(width * side * side, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, outputs),
    ]


def shaped(net: Net, inputs: Tensor) -> Tensor:
    """Images as the net takes them: rows of pixels, or squares."""
    side = round(inputs.shape[1] ** 0.5)
    return inputs.unflatten(1, (1, side, side)) if net == "convolutions" else inputs


@torch.no_grad()
def accuracy(net: BidirectionalNet, inputs: Tensor, labels: Tensor) -> float:
    """The share of right answers, in evaluation mode."""
    training = net.training
    net.eval()
    right = [net(x).argmax(1) == y for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)]
    net.train(training)
    return float(torch.cat(right).double().mean())


def first(data: Classification, examples: int, device: Any) -> Classification:
    """The data on a device, with the first test images alone."""
    return replace(
        data,
        train_inputs=data.train_inputs.to(device),
        train_labels=data.train_labels.to(device),
        test_inputs=data.test_inputs[:examples].to(device),
        test_labels=data.test_labels[:examples].to(device),
    )
