"""Which papers cite which: forward learning of links, and backpropagation with and without normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from thalweg.data.graph import EdgeSplit, Graph, Links
from thalweg.local import (
    BackpropGraph,
    GraphStack,
    LinkBatch,
    LinkTask,
    area_under_curve,
    convolutions,
    fit_layers,
    fit_together,
)
from thalweg.recipes.p09_forward_gnn.routes import Budget, Dense


@dataclass(frozen=True, slots=True)
class LinkRoute:
    """One row of the table of links.

    Args:
        name: in tables.
        logit: of `LinkTask`; None for backpropagation.
        normalized: inputs of unit length, for backpropagation.
        graph: whether messages pass; False leaves the features alone.
        shuffled: the features are shuffled among the nodes, for a control.
    """

    name: str
    logit: str | None = None
    normalized: bool = False
    graph: bool = True
    shuffled: bool = False


FORWARD, PLAIN, NORMALIZED = "forward learning", "backprop", "backprop, unit length"
LINK_ROUTES = (
    LinkRoute(FORWARD, "product"),
    LinkRoute("forward-forward", "goodness"),
    LinkRoute(PLAIN),
    LinkRoute(NORMALIZED, normalized=True),
    LinkRoute("features alone, unit length", normalized=True, graph=False),
    LinkRoute("control: features shuffled", "product", shuffled=True),
)


def train_links(
    route: LinkRoute, graph: Graph, budget: Budget, seed: int, device: torch.device
) -> dict[str, Any]:
    """Train one row on the edges of a seed's split.

    Returns:
        `area` under the ROC curve of the test pairs in [0, 1]; `first`, that of the first layer alone, for
        forward learners; `steps`.
    """
    split = graph.split_edges(seed=seed)
    features = graph.row_normalized()
    if route.shuffled:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        features = features[order]
    train, validation, test = (
        _batch(features, split, part, device) for part in (split.train, split.validation, split.test)
    )
    torch.manual_seed(seed)
    widths = [features.shape[1], *[budget.hidden] * budget.layers]
    convs = convolutions("gcn", widths) if route.graph else [Dense(*pair) for pair in pairwise(widths)]
    fit: dict[str, Any] = {
        "optimizer": partial(torch.optim.Adam, lr=budget.rate),
        "validation": validation,
        "score": lambda predicted: area_under_curve(predicted, validation.present),
        "steps": budget.steps,
        "patience": budget.patience,
    }
    if route.logit is None:
        twin: Any = BackpropGraph(convs, normalize="length" if route.normalized else None).to(device)
        steps = fit_together(twin, train, **fit).steps
        return {"area": area_under_curve(twin.predict(test), test.present), "first": None, "steps": steps}
    learner = GraphStack(convs, LinkTask(route.logit)).to(device)
    steps = sum(layer.steps for layer in fit_layers(learner, train, **fit))
    area, first = (
        area_under_curve(learner.predict(test, blocks=blocks), test.present) for blocks in (budget.layers, 1)
    )
    return {"area": area, "first": first, "steps": steps}


def _batch(features: torch.Tensor, split: EdgeSplit, links: Links, device: torch.device) -> LinkBatch:
    return LinkBatch(
        features.to(device), split.edges.to(device), links.pairs.to(device), links.present.to(device)
    )
