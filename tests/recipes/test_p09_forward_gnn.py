"""The recipe of paper 09 runs from end to end, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thalweg.data import digits_graph
from thalweg.errors import ArgumentError
from thalweg.lab import Lab
from thalweg.lab.files import read_json
from thalweg.local import LabelledGraph
from thalweg.recipes import find
from thalweg.recipes.p09_forward_gnn import verdicts
from thalweg.recipes.p09_forward_gnn.exact import identities
from thalweg.recipes.p09_forward_gnn.memory_panel import neighbourhood
from thalweg.recipes.p09_forward_gnn.recipe import Config, _names
from thalweg.recipes.p09_forward_gnn.routes import (
    BACKPROP,
    CONTROLS,
    MAIN,
    SINGLE,
    VARIANTS,
    Budget,
    labelled,
    make,
    spoil,
)

RECIPE = find()[9]
IDENTITIES = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "09"
    config = RECIPE.config("smoke")
    with Lab(out, name=RECIPE.name, kind="recipe", config={}, seeds=[100], preset="smoke", quiet=True) as lab:
        RECIPE.run(config, lab)
    return out


def test_smoke_asserts_what_is_exact_and_shows_the_rest(finished: Path) -> None:
    claims = read_json(finished / "claims.json")
    assert claims["passed"]
    asserted = [claim for claim in claims["claims"] if claim["asserted"]]
    assert len(asserted) == IDENTITIES
    assert len(claims["claims"]) > len(asserted) + 15


def test_smoke_draws_every_figure(finished: Path) -> None:
    assert {path.stem for path in (finished / "figures").iterdir()} >= {"nodes", "links", "memory"}


def test_the_identities_see_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(identities(100).values()) < verdicts.ROUNDING
    original = LabelledGraph.learned_labels
    monkeypatch.setattr(
        LabelledGraph, "learned_labels", lambda self: (original(self) + self.labels[-1]).remainder(3)
    )
    assert identities(100)["leak"] > 1e-3


@pytest.mark.parametrize("route", [*MAIN, *CONTROLS, *VARIANTS], ids=lambda route: route.name)
def test_every_route_predicts_each_node(route) -> None:
    graph = digits_graph()
    budget = Budget(hidden=4, rate=0.01, steps=1, patience=1)
    split = graph.split_nodes(0, seed=100)
    batch = labelled(spoil(graph, split, route.spoiled, 100), split, torch.device("cpu"))
    found = make(route, graph, budget, 100).predict(batch)
    assert found.shape == (1797, 10)
    assert torch.isfinite(found).all()


def test_a_control_shuffles_only_what_it_names() -> None:
    graph = digits_graph()
    split = graph.split_nodes(0, seed=100)
    labels = spoil(graph, split, "labels", 1)
    assert not torch.equal(labels.labels[split.train], graph.labels[split.train])
    assert torch.equal(labels.labels[~split.train], graph.labels[~split.train])
    assert torch.equal(labels.labels[split.train].bincount(), graph.labels[split.train].bincount())
    edges = spoil(graph, split, "edges", 1)
    assert torch.equal(edges.features, graph.features)
    assert edges.edges.shape == graph.edges.shape
    assert edges.homophily() < 0.2 < graph.homophily()
    features = spoil(graph, split, "features", 1)
    assert not torch.equal(features.features, graph.features)
    assert torch.equal(features.edges, graph.edges)


def test_a_neighbourhood_gives_the_gradient_of_the_whole_graph() -> None:
    graph = digits_graph(neighbours=2)
    batch = labelled(graph, graph.split_nodes(0, seed=100), torch.device("cpu"))
    few = batch.learned[:5]
    part = neighbourhood(batch, few, rings=3)
    assert len(part.labels) < len(batch.labels) / 2
    known = torch.zeros(len(batch.labels), dtype=torch.bool).index_fill_(0, few, True)
    whole = LabelledGraph(batch.features, batch.edges, batch.labels, known)
    learner = make(MAIN[0], graph, Budget(8, 0.01, 1, 1), 100)
    gradients = []
    for each in (whole, part):
        learner.zero_grad()
        learner.phases(each)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in learner.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_verdicts_follow_the_numbers() -> None:
    def rows(accuracy: float) -> list[dict[str, float]]:
        return [{"accuracy": accuracy, "validation": accuracy, "first": accuracy, "seconds": 1.0}] * 2

    results = {name.name: rows(60.0) for name in MAIN} | {BACKPROP: rows(80.0), SINGLE: rows(78.0)}
    par, gain, *_ = verdicts.node_claims("toy", results, decisive=True)
    assert (par.holds, gain.holds) == (False, True)
    results[SINGLE] = rows(79.0)
    assert verdicts.node_claims("toy", results, decisive=True)[0].holds
    kept = {SINGLE: [100, 100], BACKPROP: [100, 200]}
    flat, line, _ = verdicts.memory_claims("toy", [2, 4], kept, decisive=True)
    assert (flat.holds, line.holds) == (True, True)
    flat, line, _ = verdicts.memory_claims(
        "toy", [2, 4], {SINGLE: [100, 120], BACKPROP: [200, 100]}, decisive=True
    )
    assert (flat.holds, line.holds) == (False, False)


def test_the_graphs_are_the_papers_where_their_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THALWEG_DATA", raising=False)
    assert _names(Config()) == ["digits"]
    monkeypatch.setenv("THALWEG_DATA", "somewhere")
    assert _names(Config()) == ["cora", "citeseer"]


def test_fields_are_checked() -> None:
    with pytest.raises(ArgumentError, match="graphs"):
        Config(graphs=("reddit",))
    with pytest.raises(ArgumentError, match="convs"):
        Config(convs=())
    with pytest.raises(ArgumentError, match="steps"):
        Config(steps=0)
