"""The adjacency of a graph as a sparse matrix that multiplies, made once for all layers that see it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, without_data


class Adjacency:
    """A sparse matrix by its entries, which multiplies; make one with `gcn_adjacency` or `mean_adjacency`."""

    def __init__(self, edges: Tensor, weights: Tensor, nodes: int) -> None:
        self.edges, self.weights, self.nodes = edges, weights, nodes
        self._rows: dict[torch.dtype, Tensor] = {}

    def __matmul__(self, x: Tensor) -> Tensor:
        """The sum over the messages to each node, (nodes, width)."""
        if without_data(x):
            # compressed rows have no fake form; like their product, this one keeps nothing for backward
            shaped: Tensor = _Shaped.apply(x)  # type: ignore[no-untyped-call]
            return shaped
        if x.dtype not in (torch.float32, torch.float64):
            # no product of compressed rows in half precision on every device
            halved: Tensor = (self @ x.float()).to(x.dtype)
            return halved
        if x.dtype not in self._rows:
            self._rows[x.dtype] = self._compressed(x.dtype)
        product: Tensor = torch.sparse.mm(self._rows[x.dtype], x)
        return product

    def dense(self) -> Tensor:
        """The matrix written out, (nodes, nodes), row for target and column for source."""
        matrix = torch.zeros(self.nodes, self.nodes, dtype=self.weights.dtype, device=self.weights.device)
        return matrix.index_put_((self.edges[1], self.edges[0]), self.weights, accumulate=True)

    def _compressed(self, dtype: torch.dtype) -> Tensor:
        place = (self.nodes, self.nodes)
        indices, values = self.edges.flip(0), self.weights.to(dtype)
        entries = torch.sparse_coo_tensor(indices, values, place, check_invariants=False).coalesce()
        with warnings.catch_warnings():
            # torch announces once that compressed rows are in beta
            warnings.simplefilter("ignore", UserWarning)
            return entries.to_sparse_csr()


class _Shaped(torch.autograd.Function):
    """What a product with a square matrix looks like, without its values."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient)


def gcn_adjacency(edges: Tensor, nodes: int) -> Adjacency:
    """D^-1/2 (A + I) D^-1/2, in float64; D counts what arrives at a node, itself included.

    Args:
        edges: int64, (2, edges), from source to target; loops are replaced by one at each node.
        nodes: how many nodes there are.

    Example:
        >>> gcn_adjacency(torch.tensor([[0, 1], [1, 0]]), 2).dense()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    require_edges("edges", edges, nodes)
    loops = torch.arange(nodes, device=edges.device).expand(2, nodes)
    both = torch.cat([edges, loops], 1)
    # loops that came keep their place at weight 0, for a shape must not depend on values
    ones = torch.cat([edges[0] != edges[1], torch.ones_like(loops[0], dtype=torch.bool)]).double()
    degree = ones.new_zeros(nodes).index_add(0, both[1], ones)
    return Adjacency(both, ones * degree[both[0]].rsqrt() * degree[both[1]].rsqrt(), nodes)


def mean_adjacency(edges: Tensor, nodes: int) -> Adjacency:
    """The mean over what arrives at a node, in float64; zero where nothing does.

    Args:
        edges: int64, (2, edges), from source to target.
        nodes: how many nodes there are.
    """
    require_edges("edges", edges, nodes)
    ones = torch.ones(edges.shape[1], dtype=torch.float64, device=edges.device)
    degree = ones.new_zeros(nodes).index_add(0, edges[1], ones)
    return Adjacency(edges.clone(), 1 / degree[edges[1]], nodes)


def require_edges(argument: str, edges: object, nodes: int) -> None:
    """Raise unless these are edges between nodes of that many."""
    if not isinstance(edges, Tensor) or edges.dtype != torch.int64 or edges.ndim != 2 or len(edges) != 2:
        raise ArgumentTypeError(argument, edges, "an int64 tensor of shape (2, edges)")
    if not edges.numel() or without_data(edges):
        return
    if int(edges.min()) < 0 or int(edges.max()) >= nodes:
        raise ArgumentError(argument, edges, f"nodes in 0 .. {nodes - 1}")


class Remembered:
    """The last two values made of some tensors, for when the very same, unchanged tensors come again.

    It keeps no tensor alive: when one of those goes, so does what was made of it.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[weakref.ref[Tensor], ...], tuple[object, ...], Any]] = []

    def of(self, key: tuple[Tensor, ...], make: Callable[[], Any], *more: object) -> Any:
        """The value for these tensors (and `more`, compared by value), made anew only if they are others.

        The value must not hold the tensors themselves.
        """
        if any(each.is_inference() or without_data(each) for each in key):
            return make()
        versions = (*(each._version for each in key), *more)
        for place, (tensors, found, value) in enumerate(self._entries):
            same = len(key) == len(tensors) and all(a is b() for a, b in zip(key, tensors))
            if same and found == versions:
                self._entries.insert(0, self._entries.pop(place))
                return value
        value = make()
        # two: what is learned from, and what is asked in between
        references = tuple(weakref.ref(each, self._forget) for each in key)
        self._entries = [(references, versions, value), *self._entries[:1]]
        return value

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._entries = [entry for entry in self._entries if not any(gone is each for each in entry[0])]

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        # a copy remembers by itself: copied tensors are not the tensors that will come
        return Remembered()

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, ()


# one for all layers: they see the same edges
_ADJACENCIES: dict[Callable[[Tensor, int], Adjacency], Remembered] = {
    gcn_adjacency: Remembered(),
    mean_adjacency: Remembered(),
}


def adjacency(make: Callable[[Tensor, int], Adjacency], edges: Tensor, nodes: int) -> Adjacency:
    """What `make` makes of these edges, remembered as long as they live."""
    require_edges("edges", edges, nodes)
    found: Adjacency = _ADJACENCIES[make].of((edges,), lambda: make(edges, nodes), nodes)
    return found
