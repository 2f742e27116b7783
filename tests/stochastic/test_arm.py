"""ARM and DisARM: exact moments by quadrature over the uniform numbers, and several layers by sampling."""

import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from known_gradients import OneLayer, TwoLayersAndMasks, assert_mean_is, per_draw, standard_errors_off
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, NonFiniteError
from thalweg.noise import Key
from thalweg.step import backward
from thalweg.stochastic import BinaryNeuron, tape
from thalweg.stochastic.arm import ARM, DisARM
from thalweg.stochastic.score_function import ScoreFunction


def nodes_and_weights(probability):
    """Two Gauss points between any two of 0, p, 1 - p, 1: exact for what is cubic between them."""
    points, weights = np.polynomial.legendre.leggauss(2)
    ends = [0.0, *sorted([probability, 1 - probability]), 1.0]
    pairs = [
        ((a + b) / 2 + (b - a) / 2 * x, (b - a) / 2 * w)
        for a, b in itertools.pairwise(ends)
        for x, w in zip(points, weights)
    ]
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*pairs)]


def moments(rule, gates, monkeypatch):
    """Mean, variance and exact gradient of the logits, integrated over the numbers of all units."""
    columns = [nodes_and_weights(float(p)) for p in OneLayer(gates, 1).probabilities]
    numbers = torch.cartesian_prod(*[nodes for nodes, _ in columns]).view(-1, gates)
    weights = torch.cartesian_prod(*[w for _, w in columns]).view(-1, gates).prod(1, keepdim=True)
    problem = OneLayer(gates, len(numbers))
    with monkeypatch.context() as patch:
        patch.setattr(tape, "uniform_numbers", lambda logits, key: numbers)
        draws = problem.draws(rule)
    mean = (weights * draws).sum(0)
    return mean, (weights * (draws - mean) ** 2).sum(0), problem.exact


@pytest.mark.parametrize("gates", [1, 3, 5])
@pytest.mark.parametrize("rule", [ARM(), DisARM()], ids=repr)
def test_e7_arm_and_disarm_are_unbiased(rule, gates, monkeypatch):
    mean, _, exact = moments(rule, gates, monkeypatch)
    assert (mean - exact).abs().max() < 1e-12


@pytest.mark.parametrize("gates", [1, 3, 5])
def test_e7_disarm_varies_less_than_arm_at_every_unit(gates, monkeypatch):
    _, disarm, _ = moments(DisARM(), gates, monkeypatch)
    _, arm, _ = moments(ARM(), gates, monkeypatch)
    assert (disarm <= arm * (1 + 1e-12)).all()
    assert disarm.sum() < 0.95 * arm.sum()


@pytest.mark.parametrize(
    "rule", [ARM(), DisARM(), ScoreFunction("leave_one_out", samples=2)], ids=["arm", "disarm", "rloo"]
)
def test_e7_unbiased_through_two_layers_and_a_random_mask(rule):
    problem = TwoLayersAndMasks(200_000)
    for draws, exact in zip(per_draw(rule, problem, problem.leaves), problem.exact()):
        assert_mean_is(draws, exact, 0.02)


def test_mirroring_all_layers_at_once_would_be_biased(monkeypatch):
    """What the runs per layer are for: the check above sees the shortcut."""

    def all_at_once(seen, index, outcome):
        return lambda call, logits, numbers: tape.fires(logits, 1 - numbers)

    monkeypatch.setattr("thalweg.stochastic.arm._with", all_at_once)
    problem = TwoLayersAndMasks(200_000)
    found = zip(per_draw(DisARM(), problem, problem.leaves), problem.exact())
    assert max(standard_errors_off(draws, exact) for draws, exact in found) > 10


@pytest.mark.parametrize("rule", [ARM(), DisARM()], ids=repr)
def test_evaluations_and_the_random_state(rule):
    calls = []

    def closure(problem):
        calls.append(torch.get_rng_state())
        return problem()

    for problem, expected in ((OneLayer(3, 8), 2), (TwoLayersAndMasks(8), 3)):
        calls.clear()
        torch.manual_seed(4)
        leaves = [problem.logits] if isinstance(problem, OneLayer) else problem.leaves
        found = rule.estimate(functools.partial(closure, problem), leaves, Key(0))
        after = torch.rand(1)
        assert found.evaluations == len(calls) == expected
        assert all(torch.equal(state, calls[0]) for state in calls)
        torch.manual_seed(4)
        loss = problem().mean()
        assert torch.equal(loss, found.loss)
        assert torch.equal(after, torch.rand(1))


def test_a_loss_without_derivative_still_teaches_the_units():
    logits, unit = torch.zeros(1, requires_grad=True), BinaryNeuron(gradient=None)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        backward(lambda: (unit(logits.expand(64)) < 0.5).float(), [logits], gradient=DisARM())
        optimizer.step()
    assert torch.sigmoid(logits) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [ARM(), DisARM(), ScoreFunction("leave_one_out", samples=2)], ids=repr)
def test_checkpoint_and_compile_draw_the_same_bits(rule, dtype):
    body = nn.Sequential(
        *(nn.Linear(4, 6), BinaryNeuron(gradient=None), nn.Dropout(0.3)),
        *(nn.Linear(6, 5), BinaryNeuron(gradient=None), nn.Linear(5, 3)),
    ).to(dtype)
    x = torch.randn(8, 4, dtype=dtype)
    found = []
    compiled = torch.compile(body, backend="aot_eager")
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=False), compiled):
        torch.manual_seed(2)
        found.append(rule.estimate(lambda r=run: r(x).pow(2).mean(1), list(body.parameters()), Key(0)))
    for other in found[1:]:
        assert torch.equal(found[0].loss, other.loss)
        assert all(torch.equal(a, b) for a, b in zip(found[0].gradients, other.gradients))


@pytest.mark.parametrize("rule", [ARM(), DisARM()], ids=repr)
def test_policies_pickle_compare_and_run_on_fake_tensors(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule == eval(repr(rule))
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(3, 2), BinaryNeuron(gradient=None), nn.Linear(2, 1))
        x = torch.randn(5, 3)
        found = rule.estimate(lambda: net(x).squeeze(1), list(net.parameters()), Key(0))
    assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]


@pytest.mark.parametrize("rule", [ARM(), DisARM()], ids=repr)
@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda net, x: net(x).mean(), "one loss per example"),
        (lambda net, x: net[0](x).pow(2).sum(1), "at least one unit with gradient=None"),
        (lambda net, x: net(x).squeeze(1)[:3], r"random unit 0: expected logits of shape \(3, ...\)"),
    ],
    ids=["scalar", "no unit", "batch"],
)
def test_wrong_closures_are_refused(rule, closure, message):
    net = nn.Sequential(nn.Linear(3, 2), BinaryNeuron(gradient=None), nn.Linear(2, 1))
    with pytest.raises(ArgumentError, match=message):
        backward(lambda: closure(net, torch.randn(5, 3)), net.parameters(), gradient=rule)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("rule", [ARM(), DisARM()], ids=repr)
def test_nan_is_refused_and_saturated_units_are_not(rule):
    unit = BinaryNeuron(gradient=None)
    for value in (float("nan"), 200.0, -200.0):
        logits = torch.full((4, 2), value, requires_grad=True)
        if value != value:
            with pytest.raises(NonFiniteError):
                backward(lambda a=logits: unit(a).sum(1), [logits], gradient=rule)
            assert logits.grad is None
        else:
            backward(lambda a=logits: unit(a).sum(1), [logits], gradient=rule)
            assert torch.equal(logits.grad, torch.zeros(4, 2))
