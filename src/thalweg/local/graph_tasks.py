"""What a layer of a graph network learns by itself: single forward with virtual nodes, and links."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
    without_data,
)
from thalweg.local.graph_adjacency import Remembered, require_edges


@dataclass(frozen=True, slots=True, eq=False)
class LabelledGraph:
    """A graph of which some labels are known: the batch of the learners of nodes, and what they predict on.

    Args:
        features: floating point, (nodes, features); row-normalise them, see `thalweg.data.Graph`.
        edges: int64, (2, edges), from source to target, an undirected edge both ways.
        labels: int64, (nodes,); what stands where `known` is False is never read.
        known: bool, (nodes,): the nodes to learn from.
        asked: bool, (nodes,): the nodes whose labels are asked for, none of them known; None for all that are
            not known. Forward-forward alone makes a difference between asked nodes and others.

    The indices of both, `learned` and `wanted`, are found once, when the graph is made.

    Raises:
        ArgumentError, ArgumentTypeError: tensors that do not fit together.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    known: Tensor
    asked: Tensor | None = None
    learned: Tensor = field(init=False)
    wanted: Tensor = field(init=False)

    def __post_init__(self) -> None:
        require_features(self.features)
        nodes = len(self.features)
        require_edges("edges", self.edges, nodes)
        _warn_of_one_way(self.edges, nodes)
        if not isinstance(self.labels, Tensor) or self.labels.dtype != torch.int64:
            raise ArgumentTypeError("labels", self.labels, f"an int64 tensor of shape ({nodes},)")
        for name in ("known", "asked"):
            mask = getattr(self, name)
            if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
                raise ArgumentTypeError(name, mask, f"a bool tensor of shape ({nodes},)")
        for name in ("labels", "known", "asked"):
            value = getattr(self, name)
            if value is not None and value.shape != (nodes,):
                raise ArgumentError(name, value, f"shape ({nodes},), one for each node")
        if not bool(self.known.any()):
            raise ArgumentError("known", "no node", "at least one node to learn from")
        if self.asked is not None and bool((self.asked & self.known).any()):
            raise ArgumentError("asked", self.asked, "nodes whose labels are not known")
        asked = ~self.known if self.asked is None else self.asked
        object.__setattr__(self, "learned", self.known.nonzero().flatten())
        object.__setattr__(self, "wanted", asked.nonzero().flatten())

    def learned_labels(self) -> Tensor:
        """The labels of the nodes to learn from, in the order of `learned`."""
        return self.labels[self.learned]


@dataclass(frozen=True, slots=True, eq=False)
class LinkBatch:
    """A graph and pairs of its nodes: the batch of `LinkTask`, and what it predicts on.

    Args:
        features: floating point, (nodes, features).
        edges: int64, (2, edges), the edges that may carry messages; never those to be predicted.
        pairs: int64, (2, pairs), the pairs of nodes to tell apart.
        present: floating point, (pairs,), 1 where an edge joins the pair and 0 where none does; read only in
            training.

    Raises:
        ArgumentError, ArgumentTypeError: tensors that do not fit together.
    """

    features: Tensor
    edges: Tensor
    pairs: Tensor
    present: Tensor

    def __post_init__(self) -> None:
        require_features(self.features)
        require_edges("edges", self.edges, len(self.features))
        _warn_of_one_way(self.edges, len(self.features))
        require_edges("pairs", self.pairs, len(self.features))
        require_floating("present", self.present)
        if self.present.shape != self.pairs.shape[1:] or not self.pairs.numel():
            raise ArgumentError("present", self.present, f"one value for each of {self.pairs.shape[1]} pairs")


GraphBatch = LabelledGraph | LinkBatch


class VirtualNodes(nn.Module):
    """Single forward: a virtual node for each class, and a node's class is the virtual node it is most like.

    The cross-entropy of the inner products between a layer's outputs, at known nodes and at virtual nodes. A
    virtual node is joined to the known nodes of its class; no negative graph is needed. Choose it first.

    Args:
        features: width of the graph's features, at least 1.
        classes: at least 2.
        temperature: by which the inner products are divided, above 0.
        bidirectional: whether messages also go from the virtual nodes to the known ones.
        seed: of the virtual nodes' features, which are normal, fixed, and saved with the model.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004.

    Example:
        >>> task = VirtualNodes(4, 3)
        >>> task.scores(torch.zeros(5 + 3, 2), None)[0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    virtual: Tensor

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        temperature: float = 1.0,
        bidirectional: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_integer("features", features, 1)
        require_integer("classes", classes, 2)
        require_positive("temperature", temperature)
        require_integer("seed", seed, 0)
        self.classes, self.temperature, self.bidirectional = classes, temperature, bidirectional
        self.register_buffer("virtual", virtual_features(classes, features, seed))
        self._entered = Remembered()

    def enter(self, graph: LabelledGraph) -> tuple[Tensor, Tensor]:
        """The features and the edges of the graph with its virtual nodes, which come last."""
        require_graph(graph, LabelledGraph)
        key = (graph.features, graph.edges, graph.labels, graph.known, self.virtual)
        entered: tuple[Tensor, Tensor] = self._entered.of(key, lambda: self._augmented(graph))
        return entered

    def _augmented(self, graph: LabelledGraph) -> tuple[Tensor, Tensor]:
        require_classes(graph, self.classes)
        features = with_virtual(graph.features, self.virtual)
        joined = joined_to_virtual(
            graph.edges, graph.learned, len(graph.labels) + graph.learned_labels(), self.bidirectional
        )
        return features, joined

    def ask(self, graph: LabelledGraph) -> tuple[Tensor, Tensor]:
        """What is predicted on: the same, for nodes that are asked have no virtual edge."""
        return self.enter(graph)

    def top(self, graph: LabelledGraph) -> Tensor | None:
        """What stands above the last layer: certainty where a label is known, else the uniform."""
        nodes = len(graph.labels)
        labels = torch.full(
            (nodes, self.classes), 1 / self.classes, dtype=graph.features.dtype, device=graph.features.device
        )
        certain = torch.eye(self.classes, dtype=labels.dtype, device=labels.device)
        labels = labels.index_put((graph.learned,), certain[graph.learned_labels()])
        return torch.cat([labels, certain])

    def logits(self, output: Tensor) -> Tensor:
        """The inner products of all nodes with the virtual ones, (nodes, classes)."""
        nodes = len(output) - self.classes
        return output[:nodes] @ output[nodes:].T / self.temperature

    def forward(self, output: Tensor, graph: LabelledGraph) -> Tensor:
        """The cross-entropy of each known node."""
        logits = self.logits(output)
        return F.cross_entropy(logits[graph.learned], graph.learned_labels(), reduction="none")

    def scores(self, output: Tensor, graph: LabelledGraph | None) -> Tensor:
        """Probabilities, (nodes, classes)."""
        return self.logits(output).softmax(1)


class LinkTask(nn.Module):
    """Link prediction: whether an edge joins two nodes, from the product of what a layer says of them.

    Args:
        logit: "product": the inner product, learned by cross-entropy. "goodness": the sum of squares of the
            elementwise product less `threshold`, the forward-forward version.
        threshold: of the goodness, above 0.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Park and others: Forward Learning of Graph Neural Networks. ICLR 2024, arXiv 2403.11004.

    Example:
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> batch = LinkBatch(torch.eye(2), edges, pairs=edges[:, :1], present=torch.ones(1))
        >>> LinkTask()(torch.zeros(2, 3), batch)
        tensor([0.6931])
    """

    def __init__(self, logit: str = "product", *, threshold: float = 2.0) -> None:
        super().__init__()
        require_choice("logit", logit, ("product", "goodness"))
        require_positive("threshold", threshold)
        self.logit, self.threshold = logit, threshold

    def enter(self, batch: LinkBatch) -> tuple[Tensor, Tensor]:
        """The graph as it is."""
        require_graph(batch, LinkBatch)
        return batch.features, batch.edges

    def ask(self, batch: LinkBatch) -> tuple[Tensor, Tensor]:
        """What is predicted on: the same."""
        return self.enter(batch)

    def top(self, batch: LinkBatch) -> Tensor | None:
        """Nothing stands above the last layer."""
        return None

    def logits(self, output: Tensor, batch: LinkBatch) -> Tensor:
        """One value for each pair, above 0 where an edge is likely."""
        products = output[batch.pairs[0]] * output[batch.pairs[1]]
        if self.logit == "product":
            return products.sum(1)
        return products.square().sum(1) - self.threshold

    def forward(self, output: Tensor, batch: LinkBatch) -> Tensor:
        """The binary cross-entropy of each pair."""
        logits = self.logits(output, batch)
        return F.binary_cross_entropy_with_logits(logits, batch.present.to(logits.dtype), reduction="none")

    def scores(self, output: Tensor, batch: LinkBatch) -> Tensor:
        """The probability of an edge, (pairs,)."""
        return self.logits(output, batch).sigmoid()


def virtual_features(classes: int, features: int, seed: int) -> Tensor:
    """The fixed features of the virtual nodes: normal, float32, (classes, features)."""
    return torch.randn(classes, features, generator=torch.Generator().manual_seed(seed))


def with_virtual(features: Tensor, virtual: Tensor) -> Tensor:
    """The features of the graph's nodes, then those of the virtual ones."""
    if features.shape[1] != virtual.shape[1]:
        raise ArgumentError("features", features, f"{virtual.shape[1]} features, as the task was told")
    return torch.cat([features, virtual.to(features)])


def joined_to_virtual(edges: Tensor, nodes: Tensor, virtual: Tensor, bidirectional: bool) -> Tensor:
    """Edges from some nodes to a virtual node each; back too, if asked."""
    there = torch.stack([nodes, virtual])
    added = [there, there.flip(0)] if bidirectional else [there]
    return torch.cat([edges, *added], 1)


def require_features(features: object) -> None:
    """Raise unless these are features of nodes."""
    found = require_floating("features", features)
    if found.ndim != 2 or not found.numel():
        raise ArgumentError("features", found, "shape (nodes, features), neither 0")


def require_graph(graph: object, kind: type) -> None:
    """Raise unless a batch is of that kind."""
    if not isinstance(graph, kind):
        raise ArgumentTypeError("batch", graph, f"a thalweg.local.{kind.__name__}")


def require_classes(graph: LabelledGraph, classes: int) -> None:
    """Raise unless the known labels are those classes, and each is known somewhere."""
    if without_data(graph.labels):
        return
    known = graph.learned_labels()
    if int(known.min()) < 0 or int(known.max()) >= classes:
        raise ArgumentError("labels", graph.labels, f"known labels in 0 .. {classes - 1}")
    counts = known.bincount(minlength=classes)
    if not bool(counts.all()):
        missing = int((counts == 0).nonzero()[0])
        mend = "A virtual node without edges stands for nothing: number the classes without gaps."
        raise ArgumentError("known", f"no node of class {missing}", "a known node of every class", mend)


def _warn_of_one_way(edges: Tensor, nodes: int) -> None:
    if without_data(edges):
        return
    there, back = (edges[0] * nodes + edges[1]).sort().values, (edges[1] * nodes + edges[0]).sort().values
    if not torch.equal(there, back):
        warnings.warn("edges: some go one way only; undirected(edges, nodes) adds the others", stacklevel=4)
