"""Graph convolutions in two parts: a product with the adjacency, which can be kept, and a dense layer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, without_data


@runtime_checkable
class TwoPart(Protocol):
    """A convolution that says what it takes from the neighbours before it says what it makes of it.

    `convolution(x, edges)` must equal `combine(aggregate(x, edges))`, and `aggregate` must hold nothing that
    learns. While the layers below stand still the aggregate is the same in every step: compute it once.
    """

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        """What reaches each node, (nodes, any width)."""
        ...

    def combine(self, aggregated: Tensor) -> Tensor:
        """What the layer makes of it, (nodes, width)."""
        ...


class GCN(nn.Module):
    """The graph convolution of Kipf and Welling: D^-1/2 (A + I) D^-1/2 x W + b, with torch alone.

    Args:
        inputs: width of x, at least 1.
        outputs: width of the result, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Kipf, Welling: Semi-Supervised Classification with Graph Convolutional Networks. ICLR 2017,
        arXiv 1609.02907.

    Example:
        >>> conv = GCN(4, 3)
        >>> x, edges = torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])
        >>> torch.allclose(conv(x, edges), conv.combine(conv.aggregate(x, edges)))
        True
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        require_integer("inputs", inputs, 1)
        require_integer("outputs", outputs, 1)
        self.linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        """The weighted sum over each node and its neighbours, (nodes, inputs)."""
        summed: Tensor = _adjacency(gcn_adjacency, edges, len(x)) @ x
        return summed

    def combine(self, aggregated: Tensor) -> Tensor:
        """The dense layer, (nodes, outputs)."""
        combined: Tensor = self.linear(aggregated)
        return combined

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """The whole convolution; the dense layer comes first where that makes the sum narrower."""
        if self.linear.in_features <= self.linear.out_features:
            return self.combine(self.aggregate(x, edges))
        narrow: Tensor = self.aggregate(nn.functional.linear(x, self.linear.weight), edges)
        return narrow + self.linear.bias


class SAGE(nn.Module):
    """GraphSAGE with the mean: [mean over neighbours ; own] W + b, with torch alone.

    Args:
        inputs: width of x, at least 1.
        outputs: width of the result, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Paper:
        Hamilton, Ying, Leskovec: Inductive Representation Learning on Large Graphs. NeurIPS 2017,
        arXiv 1706.02216.

    Example:
        >>> SAGE(4, 3)(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([2, 3])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        require_integer("inputs", inputs, 1)
        require_integer("outputs", outputs, 1)
        self.linear = nn.Linear(2 * inputs, outputs)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        """The mean over the neighbours beside the node itself, (nodes, 2 inputs)."""
        mean = _adjacency(mean_adjacency, edges, len(x)) @ x
        return torch.cat([mean, x], 1)

    def combine(self, aggregated: Tensor) -> Tensor:
        """The dense layer, (nodes, outputs)."""
        combined: Tensor = self.linear(aggregated)
        return combined

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """The whole convolution."""
        return self.combine(self.aggregate(x, edges))


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


def _adjacency(make: Callable[[Tensor, int], Adjacency], edges: Tensor, nodes: int) -> Adjacency:
    require_edges("edges", edges, nodes)
    adjacency: Adjacency = _ADJACENCIES[make].of((edges,), lambda: make(edges, nodes), nodes)
    return adjacency


class _SplitGCN:
    """The two parts of PyTorch Geometric's GCNConv."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        summed: Tensor = _adjacency(gcn_adjacency, edges, len(x)) @ x
        return summed

    def combine(self, aggregated: Tensor) -> Tensor:
        out: Tensor = self._conv.lin(aggregated)
        return out if self._conv.bias is None else out + self._conv.bias


class _SplitSAGE:
    """The two parts of PyTorch Geometric's SAGEConv with the mean."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        mean = _adjacency(mean_adjacency, edges, len(x)) @ x
        return torch.cat([mean, x], 1)

    def combine(self, aggregated: Tensor) -> Tensor:
        mean, own = aggregated.chunk(2, dim=1)
        out: Tensor = self._conv.lin_l(mean)
        return out + self._conv.lin_r(own) if self._conv.root_weight else out


def two_parts(conv: nn.Module) -> TwoPart | None:
    """The two parts of a convolution, or None where it has none: attention looks at the learned values.

    Args:
        conv: `GCN`, `SAGE`, any module with the methods of `TwoPart`, or PyTorch Geometric's GCNConv and
            SAGEConv as they come (other options of theirs are called as a whole).

    Example:
        >>> two_parts(GCN(4, 3)) is not None, two_parts(nn.Linear(4, 3)) is None
        (True, True)
    """
    if isinstance(conv, TwoPart):
        return conv
    module, kind = type(conv).__module__, type(conv).__name__
    anything: Any = conv
    if module == "torch_geometric.nn.conv.gcn_conv" and kind == "GCNConv":
        plain = anything.normalize and anything.add_self_loops and not anything.improved
        return _SplitGCN(conv) if plain and anything.flow == "source_to_target" else None
    if module == "torch_geometric.nn.conv.sage_conv" and kind == "SAGEConv":
        plain = anything.aggr == "mean" and not (anything.normalize or anything.project)
        return _SplitSAGE(conv) if plain and anything.flow == "source_to_target" else None
    return None


def convolutions(
    kind: str, widths: list[int], *, top: int | None = None, feedback: bool = False
) -> list[nn.Module]:
    """A list of convolutions that fit one another.

    Args:
        kind: "gcn" or "sage".
        widths: of the input and of every layer, for example [1433, 64, 64].
        top: with `feedback`, the width of what stands above the last layer (classes); None for nothing.
        feedback: whether a layer also sees the layer above, as `TopToInput` has it.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> [conv.linear.in_features for conv in convolutions("gcn", [9, 4, 5], top=3, feedback=True)]
        [14, 7]
    """
    require_choice("kind", kind, ("gcn", "sage"))
    if len(widths) < 2:
        raise ArgumentError("widths", widths, "the width of the input and of at least one layer")
    make = {"gcn": GCN, "sage": SAGE}[kind]
    above = [*widths[2:], top or 0] if feedback else [0] * (len(widths) - 1)
    return [make(below + more, width) for below, more, width in zip(widths, above, widths[1:])]
