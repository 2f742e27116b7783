"""Couplings: rows stay together, keys decide, minibatch transport is optimal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    Coupling,
    Independent,
    MinibatchTransport,
    Paired,
    Reflowed,
    optimal_assignment,
    transport_cost,
)
from thalweg.noise import Key, normal

SQUARES = {
    "square": None,
    "length": lambda a, b: (a[:, None] - b[None]).norm(dim=2),
}


@pytest.mark.parametrize("cost", list(SQUARES.values()), ids=list(SQUARES))
def test_the_assignment_is_the_best_of_all_permutations(cost):
    data, source = torch.randn(2, 6, 2, dtype=torch.float64)

    def total(order):
        if cost is None:
            return float((data - source[list(order)]).square().sum())
        return float((data - source[list(order)]).norm(dim=1).sum())

    best = min(map(total, itertools.permutations(range(6))))
    assert total(optimal_assignment(data, source, cost=cost).tolist()) == pytest.approx(best, rel=1e-12)


def test_minibatch_transport_deals_out_the_same_points_at_a_lower_cost():
    independent = Independent(lambda n, key: normal(torch.empty(n, 2), key) * 2 + 1)
    for seed in range(5):
        before = independent.draw(50, Key(seed))
        after = MinibatchTransport(independent).draw(50, Key(seed))
        assert torch.equal(before.data, after.data)
        assert torch.equal(before.source.sort(0).values, after.source.sort(0).values)
        costs = [float(transport_cost(pair.data, pair.source).mean()) for pair in (before, after)]
        assert costs[1] < costs[0]


def test_minibatch_transport_of_one_row_changes_nothing():
    independent = Independent(torch.randn(10, 2))
    first, second = independent.draw(1, Key(0)), MinibatchTransport(independent).draw(1, Key(0))
    assert torch.equal(first.source, second.source)


def test_larger_batches_come_closer_to_the_optimum():
    """In one dimension the optimum from N(0, 1) to N(3, 2^2) costs 3^2 + 1; independent pairs cost 14."""
    coupling = MinibatchTransport(Independent(lambda n, key: 3 + 2 * normal(torch.empty(n, 1), key)))

    def cost(size):
        draws = [coupling.draw(size, Key(0, step)) for step in range(2048 // size)]
        return float(torch.cat([transport_cost(d.data, d.source) for d in draws]).mean())

    small, middle, large = cost(2), cost(16), cost(256)
    assert 14 > small > middle > large > 9.3


def test_pairs_stay_together_through_draws_loaders_and_files(tmp_path):
    source = torch.randn(100, 3, dtype=torch.float64)
    labels = torch.arange(100)
    pairs = Paired(source * 2 + 1, source, {"label": labels})
    pair = pairs.draw(40, Key(1))
    assert torch.equal(pair.data, pair.source * 2 + 1)
    assert torch.equal(source[pair.conditions["label"]], pair.source)
    for data, start, conditions in DataLoader(pairs, batch_size=32, shuffle=True):
        assert torch.equal(data, start * 2 + 1)
        assert torch.equal(source[conditions["label"]], start)
    pairs.save(tmp_path / "pairs.pt")
    found = Paired.load(tmp_path / "pairs.pt")
    # in full precision: half of it would move the ends
    assert found.data.dtype == torch.float64
    assert torch.equal(found.data, pairs.data)
    assert torch.equal(found.draw(5, Key(0)).source, pairs.draw(5, Key(0)).source)
    torch.save({"x": 1}, tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match=r"Paired\.save"):
        Paired.load(tmp_path / "other.pt")


def test_rows_are_drawn_evenly_and_the_ends_independently():
    data = torch.arange(4.0)[:, None]
    pair = Independent(data, data).draw(8000, Key(0))
    counts = torch.zeros(4, 4)
    for a, b in zip(pair.data[:, 0].long(), pair.source[:, 0].long()):
        counts[a, b] += 1
    expected = 8000 / 16
    assert bool(((counts - expected).abs() < 5 * (expected * 15 / 16) ** 0.5).all())


def test_conditions_stay_with_the_data_whatever_happens_to_the_source():
    data = torch.arange(10.0)[:, None]
    coupling = Independent(data, conditions={"label": data[:, 0] * 3})
    for one in (coupling, MinibatchTransport(coupling)):
        pair = one.draw(30, Key(0))
        assert torch.equal(pair.conditions["label"], pair.data[:, 0] * 3)
    with pytest.raises(ArgumentError, match="None where data are drawn"):
        Independent(lambda n, key: data, conditions={"label": data})
    with pytest.raises(ArgumentError, match="10 rows"):
        Independent(data, conditions={"label": data[:3]})


def test_draws_come_from_the_key():
    coupling = Independent(torch.randn(50, 2))
    assert isinstance(coupling, Coupling)
    first = coupling.draw(10, Key(0, 1))
    assert torch.equal(first.source, coupling.draw(10, Key(0, 1)).source)
    assert not torch.equal(first.source, coupling.draw(10, Key(0, 2)).source)
    assert not torch.equal(first.data, coupling.draw(10, Key(0, 1, 1)).data)
    assert first.source.std() > 0.5


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 3), max_size=2), st.sampled_from([32, 64]))
def test_any_shape_is_served(rows, features, bits):
    data = torch.randn(rows, *features, dtype=torch.float32 if bits == 32 else torch.float64)
    for coupling in (Independent(data), Paired(data, data), MinibatchTransport(Independent(data))):
        pair = coupling.draw(4, Key(0))
        assert pair.data.shape == pair.source.shape == (4, *features)
        assert pair.data.dtype == pair.source.dtype == data.dtype


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Paired(torch.zeros(3, 2), torch.zeros(2, 2)), "source"),
        (lambda: Paired(torch.zeros(3), torch.zeros(3).double()), "source"),
        (lambda: Paired(torch.tensor(1.0), torch.tensor(1.0)), "data"),
        (lambda: Paired(torch.zeros(3), torch.zeros(3), {"label": torch.zeros(2)}), "conditions['label']"),
        (lambda: Independent(torch.zeros(0, 2)), "data"),
        (lambda: Independent(torch.zeros(3, 2), torch.zeros(3, 1)).draw(2, Key(0)), "source"),
        (lambda: Independent(torch.zeros(3, 2)).draw(0, Key(0)), "count"),
        (lambda: optimal_assignment(torch.zeros(2), torch.zeros(2), cost=lambda a, b: a), "cost"),
        (lambda: optimal_assignment(torch.tensor([0.0, torch.nan]), torch.zeros(2)), "cost"),
    ],
    ids=["rows", "dtype", "scalar", "conditions", "empty", "ends", "count", "cost_shape", "cost_nan"],
)
def test_bad_pairs_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


@pytest.mark.parametrize(
    "make",
    [
        lambda: Independent([1.0]),
        lambda: Independent(torch.zeros(3, dtype=torch.int64)),
        lambda: MinibatchTransport(Independent),
        lambda: MinibatchTransport(Independent(torch.zeros(3)), cost="square"),
        lambda: Independent(torch.zeros(3)).draw(2, 0),
        lambda: Reflowed(None, lambda n, key: torch.zeros(n), [1.0, 0.0]),
    ],
    ids=["list", "integers", "class", "cost", "key", "field"],
)
def test_types_are_refused_by_name(make):
    with pytest.raises(ArgumentTypeError):
        make()
