"""Convolutions in two parts, against dense references and PyTorch Geometric."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.local import GCN, SAGE, convolutions, gcn_adjacency, mean_adjacency, two_parts
from thalweg.local.graph_adjacency import Remembered

NODES = 9


def graph(nodes: int = NODES, seed: int = 0, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(nodes, nodes, generator=generator).triu(1) > 0.6
    edges = (upper | upper.T).nonzero().T.contiguous()
    return torch.randn(nodes, width, generator=generator, dtype=torch.float64), edges


def dense(edges: Tensor, nodes: int) -> Tensor:
    matrix = torch.zeros(nodes, nodes, dtype=torch.float64)
    matrix[edges[1], edges[0]] = 1.0
    return matrix


def test_gcn_normalisation_equals_a_dense_reference() -> None:
    _, edges = graph()
    with_loops = dense(edges, NODES) + torch.eye(NODES, dtype=torch.float64)
    root = with_loops.sum(1).rsqrt()
    torch.testing.assert_close(gcn_adjacency(edges, NODES).dense(), root[:, None] * with_loops * root)
    looped = torch.cat([edges, torch.tensor([[3], [3]])], 1)
    torch.testing.assert_close(gcn_adjacency(looped, NODES).dense(), gcn_adjacency(edges, NODES).dense())


def test_mean_equals_a_dense_reference_and_is_zero_for_a_lonely_node() -> None:
    _, edges = graph()
    edges = edges[:, (edges != 4).all(0)]
    matrix = dense(edges, NODES)
    reference = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(mean_adjacency(edges, NODES).dense(), reference)
    assert bool((mean_adjacency(edges, NODES).dense()[4] == 0).all())


@pytest.mark.parametrize("kind", [GCN, SAGE])
@pytest.mark.parametrize(("wide", "narrow"), [(5, 3), (3, 5)])
def test_both_parts_equal_the_whole_in_value_and_gradient(kind: Any, wide: int, narrow: int) -> None:
    x, edges = graph(width=wide)
    conv = kind(wide, narrow).double()
    whole = conv(x, edges)
    parts = conv.combine(conv.aggregate(x, edges))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    for first, second in zip(
        torch.autograd.grad(whole.sum().sin(), list(conv.parameters())),
        torch.autograd.grad(parts.sum().sin(), list(conv.parameters())),
    ):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [GCN, SAGE])
def test_permutation_equivariance(kind: Any) -> None:
    x, edges = graph()
    conv = kind(5, 4).double()
    order = torch.randperm(NODES)
    place = order.argsort()
    torch.testing.assert_close(conv(x[order], place[edges]), conv(x, edges)[order])


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_parity_with_pytorch_geometric(kind: str) -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    x, edges = graph()
    if kind == "gcn":
        ours, theirs = GCN(5, 4).double(), geometric.GCNConv(5, 4).double()
        theirs.lin.weight.data.copy_(ours.linear.weight)
        ours.linear.bias.data.normal_()
        theirs.bias.data.copy_(ours.linear.bias)
    else:
        ours, theirs = SAGE(5, 4).double(), geometric.SAGEConv(5, 4).double()
        theirs.lin_l.weight.data.copy_(ours.linear.weight[:, :5])
        theirs.lin_r.weight.data.copy_(ours.linear.weight[:, 5:])
        ours.linear.bias.data.normal_()
        theirs.lin_l.bias.data.copy_(ours.linear.bias)
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), rtol=0, atol=1e-12)
    parts = two_parts(theirs)
    assert parts is not None
    torch.testing.assert_close(parts.combine(parts.aggregate(x, edges)), theirs(x, edges), rtol=0, atol=1e-12)


def test_other_convolutions_of_pytorch_geometric_are_called_as_a_whole() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    assert two_parts(geometric.GATConv(5, 4)) is None
    assert two_parts(geometric.GCNConv(5, 4, improved=True)) is None
    assert two_parts(geometric.SAGEConv(5, 4, aggr="max")) is None
    bare = geometric.SAGEConv(5, 4, root_weight=False, bias=False).double()
    parts = two_parts(bare)
    assert parts is not None
    x, edges = graph()
    torch.testing.assert_close(parts.combine(parts.aggregate(x, edges)), bare(x, edges))


def test_products_are_the_same_without_data_types_meeting() -> None:
    x, edges = graph()
    adjacency = gcn_adjacency(edges, NODES)
    reference = adjacency.dense() @ x
    torch.testing.assert_close(adjacency @ x, reference)
    torch.testing.assert_close((adjacency @ x.float()).double(), reference, rtol=1e-5, atol=1e-5)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert (adjacency @ mode.from_tensor(x)).shape == reference.shape


def test_remembered_values_follow_the_tensors_and_not_their_contents() -> None:
    remembered, made = Remembered(), []
    first, second, third = torch.zeros(2), torch.zeros(2), torch.zeros(2)

    def make() -> int:
        made.append(None)
        return len(made)

    assert [remembered.of((first,), make) for _ in range(3)] == [1, 1, 1]
    assert remembered.of((second,), make) == 2
    assert remembered.of((first,), make) == 1
    first += 1
    assert remembered.of((first,), make) == 3
    assert remembered.of((first,), make, 7) == 4
    assert remembered.of((third,), make) == 5
    assert remembered.of((second,), make) == 6
    assert copy.deepcopy(remembered).of((second,), make) == 7
    with torch.inference_mode():
        inside = torch.zeros(2)
        assert remembered.of((inside,), make) != remembered.of((inside,), make)


def test_lists_of_convolutions_fit_one_another() -> None:
    assert [conv.linear.out_features for conv in convolutions("sage", [9, 4, 5])] == [4, 5]
    assert [conv.linear.in_features for conv in convolutions("gcn", [9, 4, 5], feedback=True)] == [14, 4]
    with pytest.raises(ArgumentError, match="kind"):
        convolutions("gat", [9, 4])
    with pytest.raises(ArgumentError, match="widths"):
        convolutions("gcn", [9])


@pytest.mark.parametrize(
    "edges",
    [
        torch.tensor([[0], [9]]),
        torch.tensor([[-1], [0]]),
        torch.zeros(2, 2),
        torch.zeros(3, 1).long(),
        [[0], [1]],
    ],
    ids=["beyond", "negative", "float", "three rows", "list"],
)
def test_edges_that_are_none_are_named(edges: Any) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^edges"):
        gcn_adjacency(edges, NODES)
    assert isinstance(GCN(2, 2), nn.Module)
