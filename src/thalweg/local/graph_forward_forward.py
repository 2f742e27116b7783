"""Forward-forward on graphs: right labels raise the activity of a layer, wrong labels lower it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import ArgumentError, require_choice, require_integer, require_positive
from thalweg.local.graph_adjacency import Remembered
from thalweg.local.graph_tasks import (
    LabelledGraph,
    joined_to_virtual,
    require_classes,
    require_graph,
    virtual_features,
    with_virtual,
)

Entered = tuple[Tensor, Tensor]


class LabelGoodness(nn.Module):
    """Tell graphs with right labels from graphs with wrong ones by the sum of squares of each node's output.

    The comparison for `VirtualNodes`, which needs one graph where this needs one per class, in training as
    in prediction. Choose it to reproduce forward-forward.

    Args:
        classes: at least 2.
        labels: "appended": a label is one-hot beside a node's features, so the first layer is `classes`
            wider; nodes without a label get 1 / classes everywhere. "virtual": it is an edge to the virtual
            node of its class.
        threshold: the goodness between right and wrong, above 0.
        features: width of the graph's features; only for "virtual".
        negatives: how many wrong graphs at most; each node has another wrong class in each.
        bidirectional: whether messages also go from the virtual nodes to the others.
        seed: of the wrong classes, drawn once for each graph, and of the virtual nodes' features.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004; after Hinton:
        The Forward-Forward Algorithm. 2022, arXiv 2212.13345.

    Example:
        >>> from thalweg.local import GraphStack, convolutions
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> known = torch.tensor([True, False, True])
        >>> graph = LabelledGraph(torch.eye(3), edges, torch.tensor([0, 0, 1]), known)
        >>> learner = GraphStack(convolutions("gcn", [3 + 2, 8]), LabelGoodness(2))
        >>> learner.predict(graph).shape
        torch.Size([3, 2])
    """

    virtual: Tensor

    def __init__(
        self,
        classes: int,
        *,
        labels: str = "appended",
        threshold: float = 2.0,
        features: int | None = None,
        negatives: int = 100,
        bidirectional: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_integer("classes", classes, 2)
        require_choice("labels", labels, ("appended", "virtual"))
        require_positive("threshold", threshold)
        require_integer("negatives", negatives, 1)
        require_integer("seed", seed, 0)
        if (features is None) == (labels == "virtual"):
            raise ArgumentError(
                "features", features, "the width of the features with labels='virtual', else None"
            )
        self.classes, self.labels, self.threshold = classes, labels, threshold
        self.negatives = min(negatives, classes - 1)
        self.bidirectional, self.seed = bidirectional, seed
        if features is not None:
            require_integer("features", features, 1)
            self.register_buffer("virtual", virtual_features(classes, features, seed))
        self._entered, self._asked = Remembered(), Remembered()

    def enter(self, graph: LabelledGraph) -> Entered:
        """The graph with right labels and those with wrong ones, side by side and not joined."""
        require_graph(graph, LabelledGraph)
        key = (graph.features, graph.edges, graph.labels, graph.known)
        entered: Entered = self._entered.of(key, lambda: self._right_and_wrong(graph))
        return entered

    def ask(self, graph: LabelledGraph) -> Entered:
        """One graph for each class, in which all that is asked has that class; known labels stay."""
        require_graph(graph, LabelledGraph)
        key: tuple[Tensor, ...] = (graph.features, graph.edges, graph.labels, graph.known)
        if graph.asked is not None:
            key = (*key, graph.asked)
        asked: Entered = self._asked.of(key, lambda: self._candidates(graph))
        return asked

    def forward(self, output: Tensor, graph: LabelledGraph) -> Tensor:
        """Of each known node the loss of its right label plus the mean over its wrong ones."""
        goodness = output.square().sum(1).view(self.negatives + 1, -1)
        goodness = goodness[:, graph.learned] - self.threshold
        return F.softplus(-goodness[0]) + F.softplus(goodness[1:]).mean(0)

    def scores(self, output: Tensor, graph: LabelledGraph) -> Tensor:
        """The mean of squares less the threshold under each class, (nodes, classes)."""
        goodness = output.square().mean(1).view(self.classes, -1)[:, : len(graph.labels)]
        return goodness.T - self.threshold

    def _right_and_wrong(self, graph: LabelledGraph) -> Entered:
        require_classes(graph, self.classes)
        right = graph.learned_labels()
        generator = torch.Generator().manual_seed(self.seed)
        # a random order of the wrong classes of each node: the right one is moved by 1 to classes - 1
        order = torch.rand(len(right), self.classes - 1, generator=generator).argsort(1).to(right.device)
        wrong = (right[:, None] + 1 + order[:, : self.negatives]) % self.classes
        everything = [right, *wrong.T]
        return self._side_by_side(graph, [(graph.learned, classes) for classes in everything])

    def _candidates(self, graph: LabelledGraph) -> Entered:
        require_classes(graph, self.classes)
        labelled = torch.cat([graph.learned, graph.wanted])
        labels = []
        for candidate in range(self.classes):
            every = torch.cat([graph.learned_labels(), torch.full_like(graph.wanted, candidate)])
            labels.append((labelled, every))
        return self._side_by_side(graph, labels)

    def _side_by_side(self, graph: LabelledGraph, labels: list[tuple[Tensor, Tensor]]) -> Entered:
        parts = [self._labelled(graph, nodes, classes) for nodes, classes in labels]
        nodes = len(parts[0][0])
        features = torch.cat([part for part, _ in parts])
        return features, torch.cat([edges + index * nodes for index, (_, edges) in enumerate(parts)], 1)

    def _labelled(self, graph: LabelledGraph, nodes: Tensor, classes: Tensor) -> Entered:
        """One graph in which these nodes have these labels."""
        if self.labels == "virtual":
            edges = joined_to_virtual(graph.edges, nodes, len(graph.labels) + classes, self.bidirectional)
            return with_virtual(graph.features, self.virtual), edges
        label = graph.features.new_full((len(graph.labels), self.classes), 1 / self.classes)
        certain = torch.eye(self.classes, dtype=label.dtype, device=label.device)
        label = label.index_put((nodes,), certain[classes])
        return torch.cat([graph.features, label], 1), graph.edges
