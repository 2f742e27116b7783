"""The ways to train a graph network to classify nodes, and their training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg.data.graph import Graph, NodeSplit
from thalweg.errors import MissingExtraError
from thalweg.ledger import cost
from thalweg.local import (
    BackpropGraph,
    GraphStack,
    LabelGoodness,
    LabelledGraph,
    TopToInput,
    TopToLoss,
    VirtualNodes,
    convolutions,
    fit_layers,
    fit_together,
    node_accuracy,
)
from thalweg.step import Learner, Step

Kind = Literal["single forward", "labels", "virtual", "top to input", "top to loss", "backprop", "dense"]
Spoiled = Literal["features", "labels", "edges"]
DECAYS = (0.0, 5e-4)
"""Weight decays of forward-forward, of which the validation nodes choose."""
HEADS = 4


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table of nodes.

    Args:
        name: in tables and figures.
        kind: how the network learns.
        normalized: whether the inputs of a backprop network's layers have unit length, as those of all
            forward learners have.
        spoiled: what is shuffled among the nodes before training, for a control.
    """

    name: str
    kind: Kind
    normalized: bool = False
    spoiled: Spoiled | None = None


SINGLE, BACKPROP, DENSE = "single forward", "backprop", "features alone"
DENSE_NORMALIZED = "features alone, unit length"
APPENDED, VIRTUAL = "forward-forward, labels appended", "forward-forward, virtual nodes"
MAIN = (
    Route(BACKPROP, "backprop"),
    Route("backprop, unit length", "backprop", normalized=True),
    Route(SINGLE, "single forward"),
    Route(DENSE, "dense"),
    Route(DENSE_NORMALIZED, "dense", normalized=True),
)
CONTROLS = (
    Route("control: features shuffled", "single forward", spoiled="features"),
    Route("control: edges shuffled", "single forward", spoiled="edges"),
    Route("control: training labels shuffled", "single forward", spoiled="labels"),
)
VARIANTS = (
    Route(APPENDED, "labels"),
    Route(VIRTUAL, "virtual"),
    Route("single forward, top to input", "top to input"),
    Route("single forward, top to loss", "top to loss"),
)


class Dense(nn.Module):
    """A linear layer where a convolution is expected: what the features say without the graph."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """The layer; the edges are not looked at."""
        found: Tensor = self.linear(x)
        return found


@dataclass(frozen=True, slots=True)
class Budget:
    """Size and length of a training.

    Args:
        hidden: width of a layer.
        rate: of Adam.
        steps: of a layer at most, or of the whole network where all layers learn together.
        patience: judgements, two steps apart, without a better one that end it.
        conv: "gcn", "sage" or "gat".
        layers: of the network.
    """

    hidden: int
    rate: float
    steps: int
    patience: int
    conv: str = "gcn"
    layers: int = 2


def train_nodes(
    route: Route, graph: Graph, budget: Budget, seed: int, device: torch.device
) -> dict[str, Any]:
    """Train one row on the split of a seed.

    Returns:
        `accuracy` on the test nodes and `validation` in per cent; `first`, that of the first layer alone, for
        forward learners; `seconds` of processor time; `steps`; `operations` of a step of all layers and bytes
        `kept` for its backward pass.
    """
    split = graph.split_nodes(0, seed=seed)
    batch = labelled(spoil(graph, split, route.spoiled, seed), split, device)
    labels = graph.labels.to(device)

    def accuracy(predicted: Tensor, nodes: Tensor) -> float:
        return 100 * node_accuracy(predicted, labels, nodes.to(device))

    best: dict[str, Any] | None = None
    for decay in DECAYS if route.kind in ("labels", "virtual") else DECAYS[1:]:
        torch.manual_seed(seed)
        learner = make(route, graph, budget, seed).to(device)
        begun = time.process_time()
        steps = _fit(learner, batch, budget, decay, partial(accuracy, nodes=split.validation))
        seconds = time.process_time() - begun
        predicted = learner.predict(batch)
        found = {
            "accuracy": accuracy(predicted, split.test),
            "validation": accuracy(predicted, split.validation),
            "first": _first(learner, batch, partial(accuracy, nodes=split.test)),
            "seconds": seconds,
            "steps": steps,
            "decay": decay,
        }
        if best is None or found["validation"] > best["validation"]:
            best = {**found, **step_cost(learner, batch)}
    assert best is not None
    return best


def _fit(
    learner: Any, batch: LabelledGraph, budget: Budget, decay: float, score: Callable[..., float]
) -> int:
    fit: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=budget.rate, weight_decay=decay),
        "validation": batch,
        "score": score,
        "steps": budget.steps,
        "patience": budget.patience,
    }
    if isinstance(learner, GraphStack) and not isinstance(learner, TopToInput | TopToLoss):
        return sum(layer.steps for layer in fit_layers(learner, batch, **fit))
    return fit_together(learner, batch, **fit).steps


def _first(learner: Learner, batch: LabelledGraph, score: Callable[[Tensor], float]) -> float | None:
    if not isinstance(learner, GraphStack) or isinstance(learner, TopToInput | TopToLoss):
        return None
    return score(learner.predict(batch, blocks=1))


def step_cost(learner: Any, batch: LabelledGraph) -> dict[str, int]:
    """Operations of one step of all layers, and the most bytes kept at once for a backward pass."""
    parameters = tuple(p for p in learner.parameters() if p.requires_grad)
    found = cost(Step(learner, lambda: learner.phases(batch), parameters), repeats=0)
    learner.zero_grad()
    return {"operations": found.operations, "kept": found.saved_bytes}


def labelled(graph: Graph, split: NodeSplit, device: torch.device) -> LabelledGraph:
    """The batch of all learners: the training nodes are known, the others are asked."""
    features, edges = graph.row_normalized().to(device), graph.edges.to(device)
    return LabelledGraph(features, edges, graph.labels.to(device), split.train.to(device))


def spoil(graph: Graph, split: NodeSplit, what: Spoiled | None, seed: int) -> Graph:
    """A graph with something shuffled among its nodes; of the labels, only those learned from."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(graph.labels), generator=draw)
    if what == "features":
        return replace(graph, features=graph.features[order])
    if what == "edges":
        # the same graph with its nodes renamed, so that degrees and structure stay
        moved = order[graph.edges]
        codes = (moved[0] * len(order) + moved[1]).sort().values
        return replace(graph, edges=torch.stack([codes // len(order), codes % len(order)]))
    if what == "labels":
        known = split.train.nonzero().flatten()
        labels = graph.labels.clone()
        labels[known] = labels[known[torch.randperm(len(known), generator=draw)]]
        return replace(graph, labels=labels)
    return graph


def make(route: Route, graph: Graph, budget: Budget, seed: int) -> Any:
    """The learner of a route."""
    features, classes, hidden = graph.features.shape[1], graph.classes, [budget.hidden] * budget.layers
    if route.kind in ("backprop", "dense"):
        widths = [features, *hidden[1:], classes]
        layers: list[nn.Module] = (
            [Dense(*pair) for pair in pairwise(widths)]
            if route.kind == "dense"
            else stacked(budget.conv, widths, last=True)
        )
        return BackpropGraph(layers, normalize="length" if route.normalized else None)
    task: nn.Module = VirtualNodes(features, classes, seed=seed)
    if route.kind == "top to input":
        convs = convolutions("gcn", [features, *hidden], top=classes, feedback=True)
        return TopToInput(convs, task, widths=hidden)
    if route.kind == "top to loss":
        return TopToLoss(stacked(budget.conv, [features, *hidden]), task)
    if route.kind == "labels":
        return GraphStack(
            stacked(budget.conv, [features + classes, *hidden]), LabelGoodness(classes, seed=seed)
        )
    if route.kind == "virtual":
        task = LabelGoodness(classes, labels="virtual", features=features, seed=seed)
    return GraphStack(stacked(budget.conv, [features, *hidden]), task)


def stacked(conv: str, widths: list[int], last: bool = False) -> list[nn.Module]:
    """Convolutions of those widths; attention is PyTorch Geometric's, four heads side by side.

    Raises:
        MissingExtraError: "gat" without PyTorch Geometric.
    """
    if conv != "gat":
        return convolutions(conv, widths)
    try:
        from torch_geometric.nn import GATConv
    except ImportError:
        raise MissingExtraError("torch_geometric", "graphs") from None
    layers: list[nn.Module] = [
        GATConv(below, width // HEADS, heads=HEADS) for below, width in pairwise(widths[:-1])
    ]
    final = GATConv(widths[-2], widths[-1]) if last else GATConv(widths[-2], widths[-1] // HEADS, heads=HEADS)
    return [*layers, final]


def mean(results: list[dict[str, Any]], key: str) -> float | None:
    """Over seeds; None where a row has no such number."""
    values = [each[key] for each in results]
    return None if values[0] is None else statistics.fmean(values)
