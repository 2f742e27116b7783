"""The estimator report: known estimators on a problem whose gradient is known exactly."""

import copy

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.problems import BernoulliNet
from thalweg.stochastic import (
    ARM,
    REBAR,
    BinaryNeuron,
    DisARM,
    MinimumVariance,
    ScoreFunction,
    StraightThrough,
)
from thalweg.stochastic.estimator_report import estimator_report


def bernoulli_step(gradient=None, gates=4):
    net = BernoulliNet(gates=gates, batch=3, seed=1, gradient=gradient)
    return net, net, [net.gate_weights]


RULES = {
    "plain": ScoreFunction(),
    "leave one out": ScoreFunction("leave_one_out", samples=2),
    "arm": ARM(),
    "disarm": DisARM(),
    "rebar": REBAR(),
}
EVALUATIONS = {"plain": 1, "leave one out": 2, "arm": 2, "disarm": 2, "rebar": 3, "straight-through": 1}


@pytest.mark.parametrize("exact", ["enumerate", "given"])
def test_unbiased_estimators_are_told_from_a_biased_one(exact):
    step = bernoulli_step()
    given = "enumerate" if exact == "enumerate" else [step[0].exact_gradient()[0]]
    estimators = {**RULES, "straight-through": (bernoulli_step(StraightThrough()), None)}
    report = estimator_report(step, estimators, exact=given, samples=400)
    assert {row.name: row.evaluations for row in report.rows} == EVALUATIONS
    for name in RULES:
        found = report[name].fidelity
        assert abs(found.bias) < 5 * found.bias_se
        assert found.bias_se < 0.25
    biased = report["straight-through"].fidelity
    assert abs(biased.bias) > 20 * biased.bias_se
    assert biased.squared_bias > 0.1
    assert report["disarm"].fidelity.variance < report["arm"].fidelity.variance
    assert report["disarm"].cost == 2 * report["disarm"].fidelity.variance
    assert report.reference_error == 0
    assert len(str(report).splitlines()) == 2 + len(estimators)


def test_a_sampled_reference_knows_its_error_and_serves_dropout():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), BinaryNeuron(gradient=None), nn.Dropout(0.2), nn.Linear(4, 1))
    x = torch.randn(8, 3)
    step = (net, lambda: (net(x).squeeze(1) - 1) ** 2, list(net[0].parameters()))
    with pytest.raises(ArgumentError, match=r"^exact: expected no random numbers but those of the units"):
        estimator_report(step, [DisARM()])
    report = estimator_report(step, [DisARM()], exact="sample", samples=500, limit=2000)
    row = report[repr(DisARM())]
    assert 0 < report.reference_error < 0.1
    assert abs(row.fidelity.bias) < 5 * (row.fidelity.bias_se + report.reference_error)
    assert "reference sampled" in str(report)


def test_sampling_agrees_with_enumeration():
    sampled = estimator_report(bernoulli_step(), [DisARM()], exact="sample", samples=150, limit=1500)
    counted = estimator_report(bernoulli_step(), [DisARM()], samples=150)
    (a,), (b,) = sampled.rows, counted.rows
    assert abs(a.fidelity.bias - b.fidelity.bias) < 5 * sampled.reference_error
    assert 0 < sampled.reference_error < 0.08


def test_nothing_is_left_behind():
    step = bernoulli_step()
    baseline, rebar = MinimumVariance(), REBAR()
    before, state = copy.deepcopy(step[0].state_dict()), torch.get_rng_state()
    report = estimator_report(step, {"a": ScoreFunction(baseline), "b": rebar}, samples=20)
    assert [row.fidelity.draws for row in report.rows] == [20, 20]
    assert not baseline.state_dict()
    assert all(p.grad is None for p in [*step[0].parameters(), *rebar.parameters()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in step[0].state_dict().items())


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: estimator_report(bernoulli_step(), []), "estimators"),
        (lambda: estimator_report(bernoulli_step(), DisARM()), "estimators"),
        (lambda: estimator_report(bernoulli_step(), [DisARM(), DisARM()]), "estimators"),
        (lambda: estimator_report(bernoulli_step(), {"a": "disarm"}), r"estimators\['a'\]"),
        (lambda: estimator_report(bernoulli_step(), {"a": DisARM}), r"estimators\['a'\]"),
        (
            lambda: estimator_report(bernoulli_step(), {"a": (bernoulli_step(gates=5), DisARM())}),
            r"estimators\['a'\]",
        ),
        (lambda: estimator_report(bernoulli_step(), [DisARM()], exact="guess"), "exact"),
        (lambda: estimator_report(bernoulli_step(), [DisARM()], exact=3), "exact"),
        (lambda: estimator_report(bernoulli_step(), [DisARM()], limit=1), "limit"),
        (lambda: estimator_report(bernoulli_step(), [DisARM()], samples=1), "samples"),
        (lambda: estimator_report(bernoulli_step()[0], [DisARM()]), "step"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, argument):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: expected"):
        call()


def test_more_than_twenty_units_are_not_enumerated():
    net = nn.Sequential(nn.Linear(3, 21), BinaryNeuron(gradient=None))
    step = (net, lambda: net(torch.ones(4, 3)).sum(1), net.parameters())
    with pytest.raises(ArgumentError, match="at most 20 units per example") as refusal:
        estimator_report(step, [DisARM()])
    assert "exact='sample'" in str(refusal.value)
