"""ForwardGNN: the exact checks of single forward, forward-forward, links and word from above."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.ledger import cost, price
from thalweg.local import (
    BackpropGraph,
    GraphStack,
    LabelGoodness,
    LabelledGraph,
    LinkBatch,
    LinkTask,
    TopToInput,
    TopToLoss,
    VirtualNodes,
    area_under_curve,
    convolutions,
    fit_layers,
    fit_together,
    gcn_adjacency,
    node_accuracy,
)
from thalweg.local.readout import unit_length
from thalweg.step import Learner, Phase

NODES, WIDTH, CLASSES = 24, 6, 3
ADAM = partial(torch.optim.Adam, lr=0.01, weight_decay=5e-4)


def made(seed: int = 0) -> LabelledGraph:
    """A graph whose classes show in features and edges; half of its labels are known."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NODES) % CLASSES
    same = labels[:, None] == labels
    upper = (torch.rand(NODES, NODES, generator=generator) < torch.where(same, 0.5, 0.05)).triu(1)
    features = torch.randn(NODES, WIDTH, generator=generator, dtype=torch.float64)
    features[torch.arange(NODES), labels] += 1.5
    known = torch.zeros(NODES, dtype=torch.bool)
    known[: NODES // 2] = True
    return LabelledGraph(features, (upper | upper.T).nonzero().T.contiguous(), labels, known)


def links(graph: LabelledGraph) -> LinkBatch:
    joined = graph.edges[:, graph.edges[0] < graph.edges[1]]
    pairs = torch.cat([joined, torch.stack([joined[0], (joined[1] + 7) % NODES])], 1)
    return LinkBatch(
        graph.features,
        graph.edges,
        pairs,
        torch.cat([torch.ones(joined.shape[1]), torch.zeros(joined.shape[1])]),
    )


def learner(kind: str, layers: int = 3, **options: Any) -> Any:
    torch.manual_seed(7)
    widths = [WIDTH] + [8] * layers
    if kind == "virtual nodes":
        found: Any = GraphStack(convolutions("gcn", widths), VirtualNodes(WIDTH, CLASSES), **options)
    elif kind == "appended labels":
        wider = [WIDTH + CLASSES, *widths[1:]]
        found = GraphStack(convolutions("gcn", wider), LabelGoodness(CLASSES), **options)
    elif kind == "virtual labels":
        task = LabelGoodness(CLASSES, labels="virtual", features=WIDTH)
        found = GraphStack(convolutions("gcn", widths), task, **options)
    elif kind == "top to input":
        convs = convolutions("gcn", widths, top=CLASSES, feedback=True)
        found = TopToInput(convs, VirtualNodes(WIDTH, CLASSES), widths=widths[1:], **options)
    elif kind == "top to loss":
        found = TopToLoss(convolutions("gcn", widths), VirtualNodes(WIDTH, CLASSES), **options)
    elif kind == "links":
        found = GraphStack(convolutions("gcn", widths), LinkTask(), **options)
    elif kind == "link goodness":
        found = GraphStack(convolutions("gcn", widths), LinkTask("goodness"), **options)
    elif kind == "links, top to input":
        found = TopToInput(
            convolutions("gcn", widths, feedback=True), LinkTask(), widths=widths[1:], **options
        )
    elif kind == "links, top to loss":
        found = TopToLoss(convolutions("gcn", widths), LinkTask(), **options)
    else:
        widths[-1] = CLASSES
        found = BackpropGraph(convolutions("gcn", widths), **options)
    return found.double()


BOTTOM_UP = ["virtual nodes", "appended labels", "virtual labels", "links", "link goodness"]
FROM_ABOVE = ["top to input", "top to loss", "links, top to input", "links, top to loss"]
KINDS = BOTTOM_UP + FROM_ABOVE


def batch_for(kind: str) -> Any:
    return links(made()) if kind.startswith("link") else made()


def run(found: Any, batch: Any, steps: int) -> list[float]:
    """Interleaved training, an optimizer for each phase; the losses."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    losses = []
    for _ in range(steps):
        for phase in found.phases(batch):
            optimizer = optimizers.setdefault(phase.name, ADAM(phase.parameters))
            optimizer.zero_grad()
            losses.append(float(phase.backward()))
            optimizer.step()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_locality_a_layers_loss_moves_no_other_layer(kind: str) -> None:
    found, batch = learner(kind), batch_for(kind)
    for phase in found.phases(batch):
        for parameter in found.parameters():
            parameter.grad = None
        phase.backward()
        own = {id(parameter) for parameter in phase.parameters}
        for parameter in found.parameters():
            assert (parameter.grad is not None) == (id(parameter) in own)


@pytest.mark.parametrize("kind", KINDS)
def test_locality_training_layer_2_leaves_layer_1_bit_identical(kind: str) -> None:
    found, batch = learner(kind), batch_for(kind)
    before = copy.deepcopy(found.state_dict())
    optimizer = ADAM(found.parameters())
    for _ in range(3):
        for phase in found.phases(batch, only=[1]):
            optimizer.zero_grad()
            phase.backward()
            optimizer.step()
    moved = {name for name, value in found.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"blocks.1.conv.linear.weight", "blocks.1.conv.linear.bias"}


def test_one_layer_equals_ordinary_autograd_training_step_for_step() -> None:
    found, graph = learner("virtual nodes", layers=1), made()
    twin = copy.deepcopy(found.blocks[0].conv)
    x, edges = found.task.enter(graph)
    ours, theirs = ADAM(found.parameters()), ADAM(twin.parameters())
    for _ in range(20):
        for phase in found.phases(graph):
            ours.zero_grad()
            loss = phase.backward()
            ours.step()
        z = twin(unit_length(x), edges).relu()
        logits = z[:NODES] @ z[NODES:].T
        reference = nn.functional.cross_entropy(logits[graph.known], graph.labels[graph.known])
        theirs.zero_grad()
        reference.backward()
        theirs.step()
        torch.testing.assert_close(loss, reference.detach(), rtol=0, atol=1e-12)
    for first, second in zip(found.parameters(), twin.parameters()):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*BOTTOM_UP, "top to loss"])
def test_cached_aggregation_gives_the_same_losses(kind: str) -> None:
    batch = batch_for(kind)
    kept, anew = (run(learner(kind, cached=cached), batch, 10) for cached in (True, False))
    torch.testing.assert_close(torch.tensor(kept), torch.tensor(anew), rtol=0, atol=1e-10)


def test_cached_aggregation_computes_the_product_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.local.graph_convolution import GCN

    calls = []
    whole = GCN.aggregate
    monkeypatch.setattr(GCN, "aggregate", lambda self, *args: calls.append(1) or whole(self, *args))
    graph = made()
    options: dict[str, Any] = {"optimizer": ADAM, "validation": graph, "score": lambda p: 0.0, "steps": 30}
    fit_layers(learner("virtual nodes"), graph, **options)
    # the layers below are asked twice: for the phase, and for what they add to a judgement
    assert len(calls) <= 3 + 2 * 3
    calls.clear()
    fit_layers(learner("virtual nodes", cached=False), graph, **options)
    assert len(calls) >= 3 * 30


@pytest.mark.parametrize("bidirectional", [True, False])
def test_virtual_graph_adds_an_edge_per_known_node_and_direction(bidirectional: bool) -> None:
    graph = made()
    features, edges = VirtualNodes(WIDTH, CLASSES, bidirectional=bidirectional).enter(graph)
    added = edges[:, graph.edges.shape[1] :]
    assert features.shape == (NODES + CLASSES, WIDTH)
    assert added.shape[1] == (2 if bidirectional else 1) * int(graph.known.sum())
    ends = added.amin(0)
    assert bool(graph.known[ends].all())
    assert torch.equal(added.amax(0) - NODES, graph.labels[ends])


def test_virtual_graph_is_normalised_as_a_dense_reference() -> None:
    features, edges = VirtualNodes(WIDTH, CLASSES).enter(made())
    matrix = torch.eye(len(features), dtype=torch.float64)
    matrix[edges[1], edges[0]] = 1.0
    root = matrix.sum(1).rsqrt()
    torch.testing.assert_close(gcn_adjacency(edges, len(features)).dense(), root[:, None] * matrix * root)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("link")])
def test_no_label_leak_labels_outside_the_mask_change_no_weight(kind: str) -> None:
    graph = made()
    labels = graph.labels.clone()
    hidden = (~graph.known).nonzero().flatten()
    labels[hidden] = labels[hidden.flip(0)] + 100
    other = LabelledGraph(graph.features, graph.edges, labels, graph.known)
    first, second = learner(kind), learner(kind)
    run(first, graph, 5)
    run(second, other, 5)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
    assert torch.equal(first.predict(graph), second.predict(other))


@pytest.mark.parametrize("kind", KINDS)
def test_permutation_equivariance_of_predictions(kind: str) -> None:
    graph, found = made(), learner(kind)
    order = torch.randperm(NODES)
    place = order.argsort()
    moved: Any = LabelledGraph(
        graph.features[order], place[graph.edges], graph.labels[order], graph.known[order]
    )
    if kind.startswith("link"):
        batch = links(graph)
        shuffled = LinkBatch(moved.features, moved.edges, place[batch.pairs], batch.present)
        torch.testing.assert_close(found.predict(shuffled), found.predict(batch))
    else:
        torch.testing.assert_close(found.predict(moved), found.predict(graph)[order])


@pytest.mark.parametrize("kind", ["appended labels", "virtual labels"])
def test_forward_forward_loss_is_twice_ln_2_at_the_threshold(kind: str) -> None:
    task = learner(kind).task
    features, _ = task.enter(made())
    output = torch.zeros(len(features), 4, dtype=torch.float64)
    output[:, 0] = math.sqrt(task.threshold)
    losses = task(output, made())
    torch.testing.assert_close(losses, torch.full_like(losses, 2 * math.log(2)))


def test_forward_forward_shows_each_wrong_class_once_and_the_right_one_never() -> None:
    graph = made()
    features, _ = LabelGoodness(CLASSES).enter(graph)
    label = features.view(CLASSES, NODES, -1)[:, :, WIDTH:]
    shown = label[:, graph.known].argmax(2)
    assert torch.equal(shown[0], graph.labels[graph.known])
    assert torch.equal(shown.sort(0).values, torch.arange(CLASSES)[:, None].expand_as(shown))
    assert bool((label[:, ~graph.known] == 1 / CLASSES).all())
    assert LabelGoodness(CLASSES, negatives=1).enter(graph)[0].shape[0] == 2 * NODES


def test_forward_forward_asks_only_the_asked() -> None:
    graph = made()
    asked = torch.zeros(NODES, dtype=torch.bool)
    asked[-3:] = True
    some = LabelledGraph(graph.features, graph.edges, graph.labels, graph.known, asked)
    features, _ = LabelGoodness(CLASSES).ask(some)
    label = features.view(CLASSES, NODES, -1)[:, :, WIDTH:]
    for candidate in range(CLASSES):
        assert bool((label[candidate, asked].argmax(1) == candidate).all())
        assert torch.equal(label[candidate, graph.known].argmax(1), graph.labels[graph.known])
        assert bool((label[candidate, ~(asked | graph.known)] == 1 / CLASSES).all())


@pytest.mark.parametrize("kind", BOTTOM_UP)
def test_ensemble_of_one_layer_is_that_layer(kind: str) -> None:
    found, batch = learner(kind, layers=2), batch_for(kind)
    scores = found.scores(batch)
    torch.testing.assert_close(found.predict(batch, blocks=1), scores[0])
    total = scores[0] + scores[1]
    torch.testing.assert_close(found.predict(batch), total / 2 if kind.startswith("link") else total)


def test_row_norm_of_a_zero_row_is_zero() -> None:
    assert unit_length(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    graph = made()
    features = graph.features.clone()
    features[:4] = 0
    empty = LabelledGraph(features, graph.edges, graph.labels, graph.known)
    losses = run(learner("virtual nodes"), empty, 2)
    assert all(math.isfinite(loss) for loss in losses)


def test_temperature_infinite_is_uniform_and_a_constant_changes_nothing() -> None:
    output = torch.randn(NODES + CLASSES, 4, dtype=torch.float64)
    hot = VirtualNodes(WIDTH, CLASSES, temperature=1e12)
    torch.testing.assert_close(hot.scores(output, None), torch.full((NODES, CLASSES), 1 / CLASSES).double())
    task, graph = VirtualNodes(WIDTH, CLASSES), made()
    # the same vector added to every virtual node adds one constant to all logits of a node
    shifted = output.clone()
    shifted[NODES:] += torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(task.scores(shifted, graph), task.scores(output, graph))
    torch.testing.assert_close(task(shifted, graph), task(output, graph))


def test_links_are_judged_by_the_product_of_their_ends() -> None:
    batch = links(made())
    output = torch.randn(NODES, 4, dtype=torch.float64)
    products = output[batch.pairs[0]] * output[batch.pairs[1]]
    torch.testing.assert_close(LinkTask().scores(output, batch), products.sum(1).sigmoid())
    goodness = LinkTask("goodness", threshold=1.5)
    torch.testing.assert_close(goodness.logits(output, batch), products.square().sum(1) - 1.5)


def test_top_to_input_alternates_on_fresh_states() -> None:
    graph = made()
    found = learner("top to input")
    assert [phase.name for phase in found.phases(graph)] == ["block 0", "block 2", "block 1"]
    together = learner("top to input", alternating=False)
    states = copy.deepcopy(together)
    seen = {phase.name: phase.state.clone() for phase in together.phases(graph)}
    x, context = states.enter(graph)
    top = states.task.top(graph)
    said = states._bottom_up(x, context, top)
    expected = torch.cat([unit_length(said[0]), unit_length(said[2])], 1)
    torch.testing.assert_close(seen["block 1"], expected)
    torch.testing.assert_close(seen["block 2"], torch.cat([unit_length(said[1]), unit_length(top)], 1))


def test_top_to_input_states_go_on_from_step_to_step_until_restarted() -> None:
    graph, found = made(), learner("top to input")

    def seen() -> Tensor:
        return next(iter(found.phases(graph))).state.clone()

    first = seen()
    for phase in found.phases(graph):
        phase.output()
    assert not torch.equal(seen(), first)
    found.restart()
    assert torch.equal(seen(), first)
    list(found.phases(graph))
    found.load_state_dict(found.state_dict())
    assert torch.equal(seen(), first)


def test_top_to_loss_judges_by_the_mean_with_the_layers_above_and_clips() -> None:
    graph, found = made(), learner("top to loss", clip=1e-3)
    x, context = found.enter(graph)
    states = found._bottom_up(x, context)
    for index, phase in enumerate(found.phases(graph)):
        judged = states[index]
        for above in states[index + 1 :]:
            judged = judged + unit_length(above)
        expected = found.task(judged / (3 - index), graph).mean()
        torch.testing.assert_close(phase.backward(), expected)
        norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in phase.parameters))
        assert norm == pytest.approx(1e-3, rel=2e-3)
    uneven = TopToLoss(convolutions("gcn", [WIDTH, 8, 4]), VirtualNodes(WIDTH, CLASSES)).double()
    with pytest.raises(ArgumentError, match="one width"):
        uneven.predict(graph)


@pytest.mark.parametrize("kind", [*KINDS, "backprop"])
def test_every_learner_learns(kind: str) -> None:
    batch, found = batch_for(kind), learner(kind, layers=2)
    assert isinstance(found, Learner)
    assert all(isinstance(phase, Phase) for phase in found.phases(batch))

    def score(predicted: Tensor) -> float:
        if kind.startswith("link"):
            return area_under_curve(predicted, batch.present)
        return node_accuracy(predicted, batch.labels, ~batch.known)

    options: dict[str, Any] = {"optimizer": ADAM, "validation": batch, "score": score, "steps": 150}
    fit = fit_layers if kind in BOTTOM_UP else fit_together
    fit(found, batch, **options)
    # the chance of a node is 1 / 3, of a link 1 / 2
    assert score(found.predict(batch)) > 0.75


def test_fitting_keeps_the_best_step_and_stops_where_nothing_gets_better() -> None:
    graph, found = made(), learner("virtual nodes", layers=1)
    judged = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2])
    kept: list[Tensor] = []

    def score(predicted: Tensor) -> float:
        kept.append(found.blocks[0].conv.linear.weight.detach().clone())
        return next(judged)

    (layer,) = fit_layers(
        found, graph, optimizer=ADAM, validation=graph, score=score, steps=50, every=2, patience=3
    )
    assert (layer.steps, layer.best_step, layer.score) == (10, 4, 0.9)
    assert torch.equal(found.blocks[0].conv.linear.weight, kept[1])
    assert all(parameter.grad is None for parameter in found.parameters())


def test_convolutions_of_pytorch_geometric_and_any_callable_module_fit() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    graph = made()
    for convs in (
        [geometric.GATConv(WIDTH, 2, heads=4), geometric.GATConv(8, 2, heads=4)],
        [geometric.GCNConv(WIDTH, 8), geometric.SAGEConv(8, 8)],
    ):
        found = GraphStack(convs, VirtualNodes(WIDTH, CLASSES)).double()
        before = run(found, graph, 1)
        after = run(found, graph, 20)[-2:]
        assert sum(after) < sum(before)


@pytest.mark.parametrize("kind", [*KINDS, "backprop"])
def test_price_reads_nothing_from_fake_tensors_and_bounds_the_cost(kind: str) -> None:
    found, batch = (
        learner(kind, **({} if "input" in kind or kind == "backprop" else {"cached": False})),
        batch_for(kind),
    )
    step = (found, lambda: found.phases(batch), list(found.parameters()))
    (priced,) = price(step)
    costed = cost(step, repeats=1).saved_bytes
    # a price is that of the first step, in which nothing is remembered yet
    assert 0 < costed <= priced.saved_bytes <= 2 * costed


def test_bytes_kept_do_not_grow_with_depth_beside_backpropagation() -> None:
    graph = made()
    shallow, deep = (
        [
            cost((each, lambda each=each: each.phases(graph), list(each.parameters())), repeats=1).saved_bytes
            for each in (learner("virtual nodes", layers=depth), learner("backprop", layers=depth))
        ]
        for depth in (2, 16)
    )
    assert deep[0] <= 1.1 * shallow[0]
    assert deep[1] > 4 * shallow[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_predictions_keep_the_data_type(dtype: torch.dtype) -> None:
    graph = made()
    like = LabelledGraph(graph.features.to(dtype), graph.edges, graph.labels, graph.known)
    for kind in ("virtual nodes", "appended labels", "top to input", "top to loss"):
        assert learner(kind).to(dtype).predict(like).dtype == dtype


def test_area_under_curve_counts_pairs_in_order() -> None:
    predicted = torch.tensor([0.3, 0.1, 0.3, 0.9, 0.2, 0.3])
    present = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    right = [(a > b) + 0.5 * (a == b) for a in predicted[present == 1] for b in predicted[present == 0]]
    assert area_under_curve(predicted, present) == pytest.approx(float(sum(right)) / len(right))
    with pytest.raises(ArgumentError, match="both kinds"):
        area_under_curve(predicted, torch.ones(6))


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"features": torch.zeros(NODES, 2).long()}, "features"),
        ({"features": torch.zeros(NODES)}, "features"),
        ({"edges": torch.tensor([[0, NODES], [NODES, 0]])}, "edges"),
        ({"edges": torch.zeros(2, 3)}, "edges"),
        ({"labels": torch.zeros(NODES)}, "labels"),
        ({"labels": torch.zeros(3).long()}, "labels"),
        ({"known": torch.ones(NODES)}, "known"),
        ({"known": torch.zeros(NODES, dtype=torch.bool)}, "known"),
        ({"asked": torch.ones(NODES, dtype=torch.bool)}, "asked"),
        ({"asked": torch.ones(3, dtype=torch.bool)}, "asked"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_graphs_that_do_not_fit_are_named(change: dict[str, Any], argument: str) -> None:
    graph = made()
    good = {name: getattr(graph, name) for name in ("features", "edges", "labels", "known", "asked")}
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        LabelledGraph(**(good | change))


def test_edges_that_go_one_way_are_warned_of() -> None:
    graph = made()
    with pytest.warns(UserWarning, match="one way"):
        LabelledGraph(graph.features, graph.edges[:, :3], graph.labels, graph.known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"pairs": torch.tensor([[0, NODES], [1, 2]])}, "pairs"),
        ({"pairs": torch.zeros(2, 2)}, "pairs"),
        ({"present": torch.zeros(3)}, "present"),
        ({"present": torch.tensor([0, 1])}, "present"),
        ({"pairs": torch.zeros(2, 0).long(), "present": torch.zeros(0)}, "present"),
        ({"edges": torch.tensor([[0], [-1]])}, "edges"),
        ({"features": torch.zeros(0, 3)}, "features"),
    ],
    ids=["beyond", "float pairs", "too many", "whole numbers", "none", "negative", "no node"],
)
def test_links_that_do_not_fit_are_named(change: dict[str, Any], argument: str) -> None:
    graph = made()
    pairs = torch.tensor([[0, 1], [2, 3]])
    good = {"features": graph.features, "edges": graph.edges, "pairs": pairs, "present": torch.ones(2)}
    LinkBatch(**good)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"^{argument}"):
        LinkBatch(**(good | change))


def test_an_aggregate_goes_with_its_input() -> None:
    """Nothing of a graph is kept alive by a learner that saw it."""
    graph, found = made(), learner("virtual nodes")
    run(found, graph, 2)
    features = weakref.ref(graph.features)
    del graph
    gc.collect()
    assert features() is None
    assert not found.task._entered._entries


def test_every_kind_of_learner_survives_copying_and_saving(tmp_path: Path) -> None:
    graph = made()
    for kind in ("virtual nodes", "virtual labels", "top to input", "top to loss"):
        found = learner(kind)
        run(found, graph, 2)
        expected = found.predict(graph)
        torch.save(found.state_dict(), tmp_path / "state.pt")
        other = learner(kind)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(other.predict(graph), expected)
        assert torch.equal(copy.deepcopy(found).predict(graph), expected)
        assert torch.equal(pickle.loads(pickle.dumps(found)).predict(graph), expected)


def test_classes_that_nobody_knows_are_refused() -> None:
    graph = made()
    lonely = graph.labels.clone()
    lonely[graph.known & (graph.labels == 1)] = 0
    for task in (VirtualNodes(WIDTH, CLASSES), LabelGoodness(CLASSES)):
        with pytest.raises(ArgumentError, match="no node of class 1"):
            task.enter(LabelledGraph(graph.features, graph.edges, lonely, graph.known))
        with pytest.raises(ArgumentError, match="labels"):
            task.enter(LabelledGraph(graph.features, graph.edges, graph.labels + 1, graph.known))
    with pytest.raises(ArgumentError, match="features"):
        VirtualNodes(WIDTH + 1, CLASSES).enter(graph)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: VirtualNodes(WIDTH, CLASSES, temperature=0.0), "temperature"),
        (lambda: VirtualNodes(WIDTH, 1), "classes"),
        (lambda: LabelGoodness(CLASSES, threshold=-1.0), "threshold"),
        (lambda: LabelGoodness(CLASSES, labels="virtual"), "features"),
        (lambda: LabelGoodness(CLASSES, features=3), "features"),
        (lambda: LabelGoodness(CLASSES, labels="painted"), "labels"),
        (lambda: LinkTask("distance"), "logit"),
        (lambda: GraphStack(convolutions("gcn", [4, 4]), nn.Linear(2, 2)), "task"),
        (lambda: GraphStack([convolutions("gcn", [4, 4])[0]] * 2, LinkTask()), "blocks"),
        (lambda: GraphStack([], LinkTask()), "convs"),
        (lambda: TopToInput(convolutions("gcn", [4, 4]), LinkTask(), widths=[4, 4]), "widths"),
        (lambda: TopToInput(convolutions("gcn", [4, 4]), LinkTask(), widths=[4], skip=10), "skip"),
        (lambda: TopToInput(convolutions("gcn", [4, 4]), LabelGoodness(CLASSES), widths=[4]), "task"),
        (lambda: TopToLoss(convolutions("gcn", [4, 4]), LinkTask(), clip=0.0), "clip"),
        (lambda: BackpropGraph(convolutions("gcn", [4, 4]), normalize="rows"), "normalize"),
        (lambda: learner("virtual nodes").predict(links(made())), "batch"),
        (lambda: learner("links").predict(made()), "batch"),
        (lambda: learner("virtual nodes").predict(made(), blocks=4), "blocks"),
        (lambda: fit_layers(learner("top to loss"), made(), **FIT), "learner"),
        (lambda: fit_layers(learner("virtual nodes"), made(), **(FIT | {"patience": 0})), "patience"),
        (lambda: fit_together(nn.Linear(2, 2), made(), **FIT), "learner"),
    ],
    ids=[
        "temperature", "classes", "threshold", "no width", "a width", "labels", "logit", "task", "shared",
        "none", "widths", "skip", "goodness from above", "clip", "normalize", "links for nodes",
        "nodes for links", "too many", "greedy from above", "patience", "no learner",
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_named(make: Any, argument: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}"):
        make()


FIT: dict[str, Any] = {"optimizer": ADAM, "validation": None, "score": lambda predicted: 0.0}
