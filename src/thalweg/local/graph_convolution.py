"""Graph convolutions in two parts: a product with the adjacency, which can be kept, and a dense layer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, require_choice, require_integer
from thalweg.local.graph_adjacency import adjacency, gcn_adjacency, mean_adjacency


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
        summed: Tensor = adjacency(gcn_adjacency, edges, len(x)) @ x
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
        mean = adjacency(mean_adjacency, edges, len(x)) @ x
        return torch.cat([mean, x], 1)

    def combine(self, aggregated: Tensor) -> Tensor:
        """The dense layer, (nodes, outputs)."""
        combined: Tensor = self.linear(aggregated)
        return combined

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """The whole convolution."""
        return self.combine(self.aggregate(x, edges))


class _SplitGCN:
    """The two parts of PyTorch Geometric's GCNConv."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        summed: Tensor = adjacency(gcn_adjacency, edges, len(x)) @ x
        return summed

    def combine(self, aggregated: Tensor) -> Tensor:
        out: Tensor = self._conv.lin(aggregated)
        return out if self._conv.bias is None else out + self._conv.bias


class _SplitSAGE:
    """The two parts of PyTorch Geometric's SAGEConv with the mean."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv

    def aggregate(self, x: Tensor, edges: Tensor) -> Tensor:
        mean = adjacency(mean_adjacency, edges, len(x)) @ x
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
