"""A graph with features and labels at its nodes, and its splits for the two tasks set on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_integer


@dataclass(frozen=True, slots=True, eq=False)
class NodeSplit:
    """Three masks over the nodes, bool, (nodes,): each node is in exactly one."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """Pairs of nodes, int64, (2, pairs), and whether an edge joins them, float32 of 0 and 1, (pairs,)."""

    pairs: Tensor
    present: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EdgeSplit:
    """The edges that may carry messages, and the pairs to tell apart.

    Args:
        edges: int64, (2, edges): the training edges, both ways; the others stay unseen.
        train, validation, test: as many absent pairs as present ones in each.
    """

    edges: Tensor
    train: Links
    validation: Links
    test: Links


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """Nodes with features and labels, joined by undirected edges.

    Args:
        features: float32, (nodes, features), not normalised.
        edges: int64, (2, edges): every edge both ways, no loops, none twice.
        labels: int64, (nodes,), each in 0 .. classes - 1.
        classes: number of classes, at least 2.
        name: what the graph is called in tables.

    Raises:
        ArgumentError, ArgumentTypeError: tensors that do not fit together.

    Example:
        >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> path = Graph(torch.eye(3), edges, torch.tensor([0, 0, 1]), classes=2, name="path")
        >>> path.homophily()
        0.5
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    classes: int
    name: str

    def __post_init__(self) -> None:
        require_integer("classes", self.classes, 2)
        if self.features.dtype != torch.float32 or self.features.ndim != 2:
            raise ArgumentTypeError("features", self.features, "a float32 tensor of shape (nodes, features)")
        nodes = len(self.features)
        if self.labels.dtype != torch.int64 or self.labels.shape != (nodes,):
            raise ArgumentTypeError("labels", self.labels, f"an int64 tensor of shape ({nodes},)")
        if nodes and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise ArgumentError("labels", self.labels, f"labels in 0 .. {self.classes - 1}")
        if self.edges.dtype != torch.int64 or self.edges.ndim != 2 or len(self.edges) != 2:
            raise ArgumentTypeError("edges", self.edges, "an int64 tensor of shape (2, edges)")
        if self.edges.numel() and not 0 <= int(self.edges.min()) <= int(self.edges.max()) < nodes:
            raise ArgumentError("edges", self.edges, f"nodes in 0 .. {nodes - 1}")
        if not torch.equal(undirected(self.edges, nodes), _ordered(self.edges, nodes)):
            mend = "Pass undirected(edges, nodes)."
            raise ArgumentError("edges", self.edges, "every edge both ways, no loops, none twice", mend)

    def homophily(self) -> float:
        """The share of edges that join nodes of the same class."""
        return float((self.labels[self.edges[0]] == self.labels[self.edges[1]]).float().mean())

    def row_normalized(self) -> Tensor:
        """The features, each row divided by its sum; a row that sums to zero stays."""
        total = self.features.sum(1, keepdim=True)
        return self.features / torch.where(total == 0, torch.ones_like(total), total)

    def split_nodes(self, fold: int = 0, *, folds: int = 5, seed: int = 101) -> NodeSplit:
        """One fold for testing, a fifth of the rest for validation: 64, 16 and 20 % with five folds.

        Args:
            fold: which, 0 to folds - 1.
            folds: how many, at least 2.
            seed: of the permutation that is cut into folds.

        Raises:
            ArgumentError, ArgumentTypeError: a number out of range, or fewer nodes than folds.
        """
        require_integer("folds", folds, 2)
        require_integer("fold", fold, 0)
        require_integer("seed", seed, 0)
        nodes = len(self.labels)
        if fold >= folds:
            raise ArgumentError("fold", fold, f"less than folds, which is {folds}")
        if nodes < 2 * folds:
            raise ArgumentError("folds", folds, f"at most half of the {nodes} nodes")
        parts = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed)).tensor_split(folds)
        rest = torch.cat([part for index, part in enumerate(parts) if index != fold])
        # the folds are already in random order, but their order is that of the other folds
        again = torch.Generator().manual_seed(seed + 1 + fold)
        rest = rest[torch.randperm(len(rest), generator=again)]
        held = len(rest) // 5
        chosen = (rest[held:], rest[:held], parts[fold])
        masks = [torch.zeros(nodes, dtype=torch.bool).index_fill_(0, which, True) for which in chosen]
        return NodeSplit(*masks)

    def split_edges(self, *, seed: int) -> EdgeSplit:
        """64 % of the edges to train on, 16 % for validation, 20 % for testing, and as many absent pairs.

        Args:
            seed: of the permutation of the edges and of the draw of the absent pairs.

        Raises:
            ArgumentError: fewer than five edges, or a graph so dense that absent pairs cannot be drawn.
        """
        require_integer("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        once = self.edges[:, self.edges[0] < self.edges[1]]
        count = once.shape[1]
        if count < 5:
            raise ArgumentError("edges", f"{count} edges", "at least 5 edges")
        once = once[:, torch.randperm(count, generator=generator)]
        absent = self._absent_pairs(count, generator)
        train, validation = round(0.64 * count), round(0.16 * count)
        cuts = (slice(0, train), slice(train, train + validation), slice(train + validation, count))
        parts = [_links(once[:, cut], absent[:, cut]) for cut in cuts]
        messages = once[:, :train]
        return EdgeSplit(torch.cat([messages, messages.flip(0)], 1), *parts)

    def _absent_pairs(self, count: int, generator: torch.Generator) -> Tensor:
        nodes = len(self.labels)
        if 2 * count > nodes * (nodes - 1) // 2:
            raise ArgumentError("edges", f"{count} edges", "a graph with fewer edges than absent pairs")
        taken = _codes(self.edges[:, self.edges[0] < self.edges[1]], nodes)
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            drawn = torch.randint(nodes, (2, 2 * count), generator=generator).sort(0).values
            codes = _codes(drawn[:, drawn[0] < drawn[1]], nodes)
            found = torch.cat([found, codes[~torch.isin(codes, taken)]])
            kept, place = torch.unique(found, return_inverse=True)
            # of equal codes the first drawn, in the order of drawing
            first = torch.full((len(kept),), len(found)).scatter_reduce_(
                0, place, torch.arange(len(found)), "amin"
            )
            found = found[first.sort().values]
        return torch.stack([found[:count] // nodes, found[:count] % nodes])


def undirected(edges: Tensor, nodes: int) -> Tensor:
    """Every edge both ways and once, without loops, ordered by source and then by target.

    Args:
        edges: int64, (2, edges).
        nodes: how many nodes there are.

    Example:
        >>> undirected(torch.tensor([[0, 0, 1, 2], [1, 1, 0, 2]]), 3)
        tensor([[0, 1],
                [1, 0]])
    """
    both = torch.cat([edges, edges.flip(0)], 1)
    codes = torch.unique(_codes(both[:, both[0] != both[1]], nodes))
    return torch.stack([codes // nodes, codes % nodes])


def _ordered(edges: Tensor, nodes: int) -> Tensor:
    codes = _codes(edges, nodes).sort().values
    return torch.stack([codes // nodes, codes % nodes]) if nodes else edges


def _codes(edges: Tensor, nodes: int) -> Tensor:
    return edges[0] * nodes + edges[1]


def _links(present: Tensor, absent: Tensor) -> Links:
    labels = torch.cat([torch.ones(present.shape[1]), torch.zeros(absent.shape[1])])
    return Links(torch.cat([present, absent], 1), labels)
