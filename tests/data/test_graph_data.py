"""Graphs with labels at their nodes, and the splits on which they are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thalweg.data import Graph, digits_graph, undirected
from thalweg.errors import ArgumentError, ArgumentTypeError


def ring(nodes: int) -> Graph:
    around = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    return Graph(torch.eye(nodes), undirected(around, nodes), torch.arange(nodes) % 2, 2, "ring")


@given(st.integers(10, 60), st.integers(2, 5), st.integers(0, 2**40))
def test_every_node_is_tested_in_exactly_one_fold(nodes: int, folds: int, seed: int) -> None:
    splits = [ring(nodes).split_nodes(fold, folds=folds, seed=seed) for fold in range(folds)]
    assert sum(split.test.long() for split in splits).tolist() == [1] * nodes
    for split in splits:
        parts = split.train.long() + split.validation.long() + split.test.long()
        assert parts.tolist() == [1] * nodes
        assert int(split.validation.sum()) == int((~split.test).sum()) // 5


def test_five_folds_are_64_16_and_20_percent() -> None:
    split = ring(1000).split_nodes()
    assert [int(mask.sum()) for mask in (split.train, split.validation, split.test)] == [640, 160, 200]


@given(st.integers(20, 60), st.integers(0, 2**40))
def test_edges_are_split_once_and_absent_pairs_are_absent(nodes: int, seed: int) -> None:
    graph = ring(nodes)
    split = graph.split_edges(seed=seed)
    parts = (split.train, split.validation, split.test)
    present = torch.cat([part.pairs[:, part.present == 1] for part in parts], 1)
    absent = torch.cat([part.pairs[:, part.present == 0] for part in parts], 1)
    assert torch.equal(undirected(present, nodes), graph.edges)
    assert present.shape == absent.shape == (2, nodes)
    assert undirected(absent, nodes).shape == (2, 2 * nodes)
    both = torch.cat([graph.edges, undirected(absent, nodes)], 1)
    assert torch.unique(both, dim=1).shape == both.shape
    messages = split.train.pairs[:, split.train.present == 1]
    assert torch.equal(undirected(split.edges, nodes), undirected(messages, nodes))
    again = graph.split_edges(seed=seed)
    assert torch.equal(again.test.pairs, split.test.pairs)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30))
def test_undirected_edges_are_those_of_a_set(pairs: list[tuple[int, int]]) -> None:
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    expected = sorted({(a, b) for a, b in pairs if a != b} | {(b, a) for a, b in pairs if a != b})
    assert [tuple(pair) for pair in undirected(edges, 8).T.tolist()] == expected


def test_rows_sum_to_one_and_empty_rows_stay() -> None:
    features = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    graph = Graph(features, torch.empty(2, 0, dtype=torch.int64), torch.tensor([0, 1]), 2, "two")
    assert graph.row_normalized().tolist() == [[0.25, 0.75], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"features": torch.zeros(3, 2, dtype=torch.float64)}, "features"),
        ({"labels": torch.tensor([0, 1])}, "labels"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels"),
        ({"edges": torch.zeros(2, 2)}, "edges"),
        ({"edges": torch.tensor([[0, 3], [3, 0]])}, "edges"),
        ({"edges": torch.tensor([[0], [1]])}, "edges"),
        ({"edges": torch.tensor([[0, 1, 2], [1, 0, 2]])}, "edges"),
        ({"edges": torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])}, "edges"),
        ({"classes": 1}, "classes"),
    ],
    ids=["dtype", "few labels", "label", "float edges", "node", "one way", "loop", "twice", "classes"],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], argument: str) -> None:
    good: dict[str, Any] = {
        "features": torch.zeros(3, 2),
        "edges": torch.tensor([[1, 0], [0, 1]]),
        "labels": torch.tensor([0, 1, 0]),
        "classes": 2,
        "name": "good",
    }
    Graph(**good)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        Graph(**(good | change))


def test_splits_refuse_what_they_cannot_cut() -> None:
    with pytest.raises(ArgumentError, match="fold"):
        ring(20).split_nodes(5)
    with pytest.raises(ArgumentError, match="folds"):
        ring(6).split_nodes()
    everything = undirected(torch.combinations(torch.arange(6)).T, 6)
    with pytest.raises(ArgumentError, match="fewer edges than absent pairs"):
        Graph(torch.eye(6), everything, torch.arange(6) % 2, 2, "complete").split_edges(seed=0)


def test_digits_are_joined_to_digits_of_their_kind() -> None:
    graph = digits_graph(neighbours=10)
    degrees = graph.edges[0].bincount()
    assert len(graph.labels) == 1797
    assert int(degrees.min()) >= 10
    assert graph.homophily() > 0.9
    with pytest.raises(ArgumentError, match="neighbours"):
        digits_graph(neighbours=1797)
