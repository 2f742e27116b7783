"""What a training step keeps as the network gets deeper."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.data.graph import Graph
from thalweg.local import LabelledGraph
from thalweg.recipes.p09_forward_gnn.routes import MAIN, SINGLE, Budget, Route, labelled, make, step_cost

GROUPS = 8
"""Into which the training nodes are cut where the gradient is accumulated."""
ACCUMULATED = "backprop, gradient accumulated"
MEMORY_ROUTES: tuple[Route, ...] = tuple(route for route in MAIN if route.name in (SINGLE, "backprop"))


def kept_bytes(
    graph: Graph, depths: tuple[int, ...], hidden: int, seed: int, device: torch.device
) -> dict[str, list[int]]:
    """The most bytes kept at once for backward, by way of training, one number for each depth."""
    batch = labelled(graph, graph.split_nodes(0, seed=seed), device)
    found: dict[str, list[int]] = {route.name: [] for route in MEMORY_ROUTES}
    found[ACCUMULATED] = []
    for depth in depths:
        budget = Budget(hidden, 1e-2, 1, 1, layers=depth)
        for route in MEMORY_ROUTES:
            torch.manual_seed(seed)
            found[route.name].append(step_cost(make(route, graph, budget, seed).to(device), batch)["kept"])
        torch.manual_seed(seed)
        twin = make(MAIN[0], graph, budget, seed).to(device)
        # one more ring than layers, so that every degree that counts is that of the whole graph
        parts = [neighbourhood(batch, nodes, depth + 1) for nodes in batch.learned.chunk(GROUPS)]
        found[ACCUMULATED].append(max(step_cost(twin, part)["kept"] for part in parts))
    return found


def neighbourhood(batch: LabelledGraph, nodes: Tensor, rings: int) -> LabelledGraph:
    """The part of a graph within some steps of given nodes, which alone are known there."""
    inside = torch.zeros(len(batch.labels), dtype=torch.bool, device=nodes.device)
    inside[nodes] = True
    known = inside.clone()
    source, target = batch.edges
    for _ in range(rings):
        inside[source[inside[target]]] = True
    number = inside.cumsum(0) - 1
    edges = number[batch.edges[:, inside[source] & inside[target]]]
    return LabelledGraph(batch.features[inside], edges, batch.labels[inside], known[inside])
