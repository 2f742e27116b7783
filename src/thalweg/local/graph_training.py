"""Training graph learners: layer by layer to the end of each, or all layers in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer
from thalweg.local.graph import GraphStack
from thalweg.step import Learner

MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
Score = Callable[[Tensor], float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a training ended.

    Args:
        name: of the layer, or "all layers".
        steps: how many were taken.
        best_step: the step whose parameters were kept.
        score: what they scored on validation.
    """

    name: str
    steps: int
    best_step: int
    score: float


def fit_layers(
    learner: GraphStack,
    graph: Any,
    *,
    optimizer: MakeOptimizer,
    validation: Any,
    score: Score,
    steps: int = 1000,
    every: int = 2,
    patience: int = 100,
) -> list[Fitted]:
    """Train each layer to its end before the next begins; what the layers below say is computed once.

    Each layer has an optimizer of its own, is judged together with the layers below it, and keeps the
    parameters of its best step.

    Args:
        learner: a `GraphStack`; those with word from above need `fit_together`.
        graph: to learn from.
        optimizer: makes one for a list of parameters, for example
            `partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4)`.
        validation: what to predict on when a layer is judged.
        score: of the predictions, larger is better; never of test labels.
        steps: per layer at most.
        every: steps between two judgements.
        patience: how many judgements in a row without a better one end a layer.

    Returns:
        How each layer ended.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> from functools import partial
        >>> from thalweg.local import LabelledGraph, VirtualNodes, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> learner = GraphStack(convolutions("gcn", [3, 8, 8]), VirtualNodes(3, 2))
        >>> found = fit_layers(learner, graph, optimizer=partial(torch.optim.Adam, lr=0.01), steps=4,
        ...     validation=graph, score=lambda predicted: node_accuracy(predicted, graph.labels, ~known))
        >>> [layer.name for layer in found]
        ['block 0', 'block 1']
    """
    _require(steps, every, patience, optimizer, score)
    if not isinstance(learner, GraphStack):
        raise ArgumentTypeError("learner", learner, "a GraphStack", "For others take fit_together.")
    if hasattr(learner, "restart"):
        raise ArgumentTypeError(
            "learner", learner, "layers that do not hear from above", "Take fit_together."
        )
    found = []
    for index in range(len(learner.blocks)):
        if not learner.learned(index):
            continue
        phase = next(iter(learner.phases(graph, only=[index])))
        stepped = optimizer(phase.parameters)
        predicted = learner.scorer(phase, validation)

        def step(phase: Any = phase, stepped: torch.optim.Optimizer = stepped) -> None:
            stepped.zero_grad()
            phase.backward()
            stepped.step()

        def judge(predicted: Callable[[], Tensor] = predicted) -> float:
            return score(predicted())

        best = _Best(phase.parameters, judge)
        found.append(_loop(phase.name, step, best, steps, every, patience))
        stepped.zero_grad()
    return found


def fit_together(
    learner: Learner,
    graph: Any,
    *,
    optimizer: MakeOptimizer,
    validation: Any,
    score: Score,
    steps: int = 1000,
    every: int = 2,
    patience: int = 100,
) -> Fitted:
    """Train all phases of a learner in every step, each with an optimizer of its own; arguments as above.

    Choose it for `TopToInput`, `TopToLoss`, `BackpropGraph`, and for a `GraphStack` whose layers shall learn
    at the same time.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.
    """
    _require(steps, every, patience, optimizer, score)
    if not isinstance(learner, Learner):
        raise ArgumentTypeError("learner", learner, "an object with the methods phases and predict")
    optimizers: dict[str, torch.optim.Optimizer] = {}
    parameters: dict[int, Tensor] = {}

    def step() -> None:
        for phase in learner.phases(graph):
            if phase.name not in optimizers:
                optimizers[phase.name] = optimizer(phase.parameters)
                parameters.update({id(each): each for each in phase.parameters})
                best.parameters = list(parameters.values())
            optimizers[phase.name].zero_grad()
            phase.backward()
            optimizers[phase.name].step()

    best = _Best([], lambda: score(learner.predict(validation)))
    fitted = _loop("all layers", step, best, steps, every, patience)
    for each in optimizers.values():
        each.zero_grad()
    if hasattr(learner, "restart"):
        learner.restart()
    return fitted


def node_accuracy(predicted: Tensor, labels: Tensor, nodes: Tensor) -> float:
    """The share of right answers among some nodes.

    Args:
        predicted: (nodes, classes).
        labels: int64, (nodes,).
        nodes: bool, (nodes,).

    Example:
        >>> node_accuracy(torch.eye(2), torch.tensor([0, 0]), torch.tensor([True, True]))
        0.5
    """
    return float((predicted[nodes].argmax(1) == labels[nodes]).double().mean())


def area_under_curve(predicted: Tensor, present: Tensor) -> float:
    """The area under the ROC curve: how often what is present ranks above what is absent; ties count half.

    Args:
        predicted: (pairs,).
        present: (pairs,), above 0.5 where present; some are and some are not.

    Raises:
        ArgumentError: only one kind.

    Example:
        >>> area_under_curve(torch.tensor([0.9, 0.4, 0.4]), torch.tensor([1.0, 1.0, 0.0]))
        0.75
    """
    right = present > 0.5
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        raise ArgumentError("present", present, "pairs of both kinds")
    _, place, count = predicted.double().unique(return_inverse=True, return_counts=True)
    # the mean rank of equal values
    rank = count.cumsum(0).double() - (count.double() - 1) / 2
    total = float(rank[place][right].sum())
    return (total - positive * (positive + 1) / 2) / (positive * negative)


class _Best:
    """The parameters of the best judgement so far."""

    def __init__(self, parameters: Sequence[Tensor], judge: Callable[[], float]) -> None:
        self.parameters = parameters
        self._judge = judge
        self.score = float("-inf")
        self.step = 0
        self.unlucky = 0
        self._kept: list[Tensor] = []

    def judge(self, step: int) -> None:
        value = self._judge()
        self.unlucky += 1
        if value > self.score:
            self.score, self.step, self.unlucky = value, step, 0
            self._kept = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self.parameters, self._kept):
            parameter.copy_(kept)


def _loop(name: str, step: Callable[[], None], best: _Best, steps: int, every: int, patience: int) -> Fitted:
    taken = 0
    while taken < steps and best.unlucky < patience:
        step()
        taken += 1
        if taken % every == 0 or taken == steps:
            best.judge(taken)
    best.restore()
    return Fitted(name, taken, best.step, best.score)


def _require(steps: int, every: int, patience: int, optimizer: object, score: object) -> None:
    require_integer("steps", steps, 1)
    require_integer("every", every, 1)
    require_integer("patience", patience, 1)
    if not callable(optimizer):
        raise ArgumentTypeError("optimizer", optimizer, "a function that makes one for a list of parameters")
    if not callable(score):
        raise ArgumentTypeError("score", score, "a function of the predictions")
