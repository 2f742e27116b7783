"""What must hold to the last digit, on a graph so small that it costs nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from thalweg.local import GraphStack, LabelledGraph, VirtualNodes, convolutions, fit_layers, unit_length
from thalweg.local.graph import GraphLayer

NODES, FEATURES, CLASSES, WIDTH, STEPS = 30, 8, 3, 5, 10


def small_graph(seed: int) -> LabelledGraph:
    """Random nodes and edges in double precision; half of the labels are known."""
    draw = torch.Generator().manual_seed(seed)
    joined = (torch.rand(NODES, NODES, generator=draw) < 0.15).triu(1)
    features = torch.rand(NODES, FEATURES, generator=draw, dtype=torch.float64)
    known = torch.arange(NODES) < NODES // 2
    return LabelledGraph(
        features, (joined | joined.T).nonzero().T.contiguous(), torch.arange(NODES) % CLASSES, known
    )


def identities(seed: int) -> dict[str, float]:
    """The largest deviation from each identity: all are to be zero, or as good as."""
    graph = small_graph(seed)
    return {
        "one layer": _one_layer(graph, seed),
        "cache": _distance(_trained(graph, seed, cached=True), _trained(graph, seed, cached=False)),
        "leak": _leak(graph, seed),
        "locality": _locality(graph, seed),
    }


def _stack(seed: int, layers: int, cached: bool = True) -> GraphStack:
    torch.manual_seed(seed)
    task = VirtualNodes(FEATURES, CLASSES, seed=seed)
    return GraphStack(convolutions("gcn", [FEATURES, *[WIDTH] * layers]), task, cached=cached).double()


def _trained(graph: LabelledGraph, seed: int, cached: bool = True, layers: int = 2) -> list[torch.Tensor]:
    learner = _stack(seed, layers, cached)
    fit_layers(
        learner,
        graph,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        validation=graph,
        score=lambda predicted: -float(F.nll_loss(predicted[graph.known].log(), graph.learned_labels())),
        steps=STEPS,
    )
    return [parameter.detach() for parameter in learner.parameters()]


def _one_layer(graph: LabelledGraph, seed: int) -> float:
    """The local route of one layer against its loss written out and differentiated as usual."""
    learner, written = _stack(seed, 1), _stack(seed, 1)
    first, task = written.blocks[0], written.task
    assert isinstance(first, GraphLayer)
    stepped = torch.optim.SGD(learner.parameters(), lr=0.1)
    usual = torch.optim.SGD(written.parameters(), lr=0.1)
    features, edges = task.enter(graph)
    for _ in range(STEPS):
        for phase in learner.phases(graph):
            stepped.zero_grad()
            phase.backward()
            stepped.step()
        usual.zero_grad()
        output = torch.relu(first.conv(unit_length(features), edges))
        logits = (output[:NODES] @ output[NODES:].T)[graph.learned]
        F.cross_entropy(logits, graph.learned_labels()).backward()
        usual.step()
    return _distance(list(learner.parameters()), list(written.parameters()))


def _leak(graph: LabelledGraph, seed: int) -> float:
    """Labels that are not known decide nothing."""
    labels = graph.labels.clone()
    labels[~graph.known] = labels[~graph.known].flip(0)
    other = LabelledGraph(graph.features, graph.edges, labels, graph.known)
    return _distance(_trained(graph, seed), _trained(other, seed))


def _locality(graph: LabelledGraph, seed: int) -> float:
    """How far a step of the second layer moves the gradient of the first: not at all."""
    learner = _stack(seed, 2)
    next(iter(learner.phases(graph, only=[1]))).backward()
    found = [p.grad for p in learner.blocks[0].parameters() if p.grad is not None]
    return max((float(grad.abs().max()) for grad in found), default=0.0)


def _distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one, other, strict=True))
