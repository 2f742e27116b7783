"""The minimum-variance baseline: exact by enumeration, from the other examples, and as moving averages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_gradients import OneLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.noise import Key
from thalweg.problems import BernoulliNet
from thalweg.score import bernoulli_score, minimum_variance_baseline
from thalweg.step import backward
from thalweg.stochastic import BinaryNeuron, MinimumVariance, ScoreFunction


def variance_and_bias(net, baseline):
    """Total variance and worst bias, over all outcomes, of the score function less baselines (batch, K)."""

    def estimator(outcomes, logits, losses):
        return bernoulli_score(outcomes, logits) * (losses[..., None] - baseline)

    mean, variance = net.moments(estimator)
    return variance.sum(), (mean - net.exact_logit_gradient()).abs().max()


def best(net):
    """The baseline of each unit of each example, from all its outcomes and their probabilities."""
    outcomes, logits = net.outcomes(), net.logits().detach()
    chances, losses = net.probabilities().detach(), net.losses(net._everyone()).detach()
    return torch.stack(
        [
            minimum_variance_baseline(outcomes - torch.sigmoid(logits[b]), losses[:, b], chances[:, b])
            for b in range(len(logits))
        ]
    )


@pytest.mark.parametrize("gates", [5, 8, 10])
def test_e1_minimum_variance_is_unbiased_and_orders_the_variances(gates):
    for seed in range(3):
        net = BernoulliNet(gates=gates, seed=seed)
        mean_loss = (net.probabilities() * net.losses(net._everyone())).sum(0).detach()[:, None]
        none, _ = variance_and_bias(net, torch.zeros_like(mean_loss))
        mean, _ = variance_and_bias(net, mean_loss)
        lowest, bias = variance_and_bias(net, best(net))
        assert bias < 1e-12
        assert lowest <= mean <= none
        assert lowest < 0.999 * mean


@pytest.mark.parametrize("direction", [0.05, -0.05])
def test_e1_no_other_baseline_varies_less(direction):
    net = BernoulliNet(gates=6)
    lowest, _ = variance_and_bias(net, best(net))
    other, _ = variance_and_bias(net, best(net) + direction)
    assert lowest < other


@pytest.mark.parametrize("seed", range(5))
def test_e2_a_single_unit_has_no_variance(seed):
    net = BernoulliNet(gates=1, seed=seed)
    variance, bias = variance_and_bias(net, best(net))
    assert variance < 1e-20
    assert bias < 1e-12
    p = torch.sigmoid(net.logits().detach())
    off, on = net.losses(net._everyone()).detach()
    torch.testing.assert_close(best(net)[:, 0], (1 - p[:, 0]) * on + p[:, 0] * off)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(0, 3), st.integers(0, 10**6))
def test_the_baseline_from_the_others_leaves_the_own_row_out(batch, width, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2)[: width + 1] if width < 2 else (batch, 2, width)
    score = torch.randn(shape, generator=generator).double()
    losses = torch.randn(batch, generator=generator).double()
    found = minimum_variance_baseline(score, losses, others=True)
    for row in range(batch):
        others = [index for index in range(batch) if index != row]
        expected = minimum_variance_baseline(score[others], losses[others])
        torch.testing.assert_close(found[row], expected)


def test_a_dominating_row_leaves_no_rounding_in_its_own_baseline():
    score, losses = torch.tensor([[1.0], [1e-6], [1e-6]]), torch.tensor([1e4, 1.0, 3.0])
    torch.testing.assert_close(minimum_variance_baseline(score, losses, others=True)[0], torch.tensor([2.0]))
    assert torch.equal(minimum_variance_baseline(torch.zeros(3, 1), losses), torch.zeros(1))


@pytest.mark.parametrize("baseline", ["mean", "minimum_variance"])
def test_each_lowers_the_variance_of_the_rule(baseline):
    def variance(rule):
        draws = torch.stack([rule.estimate(net, [net.gate_weights], Key(0)).gradients[0] for _ in range(400)])
        return draws.var(0).sum()

    net = BernoulliNet(gates=5, batch=16, seed=1)
    assert variance(ScoreFunction(baseline)) < 0.9 * variance(ScoreFunction())


def test_the_moving_averages_are_those_of_the_paper_and_one_batch_late():
    rule = ScoreFunction(MinimumVariance(momentum=0.9))
    problem = OneLayer(3, 6)
    numerator = denominator = torch.zeros(3, dtype=torch.float64)
    for step in range(4):
        torch.manual_seed(step)
        with torch.no_grad():
            bits = BinaryNeuron()(problem.logits)
        torch.manual_seed(step)
        draws = problem.draws(rule)
        torch.manual_seed(step)
        losses = problem.draws(_Losses())
        score = bits - torch.sigmoid(problem.logits.detach())
        baseline = numerator / denominator if step else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(draws, score * (losses - baseline))
        numerator = 0.9 * numerator + 0.1 * (score**2 * losses).mean(0)
        denominator = 0.9 * denominator + 0.1 * (score**2).mean(0)
    torch.testing.assert_close(rule.baseline.numerator_0, numerator)
    torch.testing.assert_close(rule.baseline.denominator_0, denominator)


class _Losses:
    """A rule that hands the losses through, one row each."""

    def estimate(self, closure, parameters, key):
        from thalweg.step import Estimate
        from thalweg.stochastic.tape import Tape

        losses = Tape().run(closure).detach()
        return Estimate(losses.mean(), (losses[:, None] / len(losses),), 1)


def test_moving_averages_converge_to_the_baseline_of_the_whole_batch():
    rule = ScoreFunction(MinimumVariance(momentum=0.99))
    problem = OneLayer(1, 2000)
    for _ in range(300):
        draws = problem.draws(rule)
    # with one unit the best baseline leaves no variance at all
    assert draws.var(0).sum() < 1e-3 * problem.draws(ScoreFunction()).var(0).sum()


def test_state_travels_and_other_units_are_refused():
    rule = ScoreFunction(MinimumVariance())
    model = nn.Module()
    model.baseline = rule.baseline
    OneLayer(3, 6).draws(rule)
    other = nn.Module()
    other.baseline = MinimumVariance()
    other.load_state_dict(model.state_dict())
    assert sorted(other.state_dict()) == ["baseline.denominator_0", "baseline.numerator_0"]
    assert torch.equal(other.baseline.numerator_0, rule.baseline.numerator_0)
    with pytest.raises(ArgumentError, match=r"^baseline: expected units of shape \(3,\) in unit call 0"):
        OneLayer(4, 6).draws(rule)


def test_fake_tensors_leave_no_trace_in_the_averages():
    rule = ScoreFunction(MinimumVariance())
    with FakeTensorMode():
        problem_logits, unit = torch.zeros(4, 3, requires_grad=True), BinaryNeuron(gradient=None)
        rule.estimate(lambda: unit(problem_logits).sum(1), [problem_logits], Key(0))
    assert not rule.baseline.state_dict()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: MinimumVariance(momentum=1.0), "momentum"),
        (lambda: MinimumVariance(momentum=0), "momentum"),
        (lambda: MinimumVariance(momentum="0.9"), "momentum"),
        (lambda: ScoreFunction(MinimumVariance), "baseline"),
        (lambda: ScoreFunction(samples=0), "samples"),
        (lambda: ScoreFunction(samples=1.5), "samples"),
        (lambda: ScoreFunction("leave_one_out"), "samples"),
        (lambda: OneLayer(3, 1).draws(ScoreFunction("minimum_variance")), "score"),
        (lambda: minimum_variance_baseline(torch.ones(3, 2), torch.ones(2)), "losses"),
        (lambda: minimum_variance_baseline(torch.ones(()), torch.ones(1)), "losses"),
        (lambda: minimum_variance_baseline(torch.ones(3), torch.ones(3), torch.ones(2)), "chances"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, argument):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: expected"):
        call()


def test_units_that_saturate_need_no_baseline():
    logits = torch.tensor([[-200.0, 0.0]]).repeat(4, 1).requires_grad_()
    unit = BinaryNeuron(gradient=None)
    for baseline in ("minimum_variance", MinimumVariance()):
        for _ in range(2):
            logits.grad = None
            backward(lambda: unit(logits).sum(1) + 3, [logits], gradient=ScoreFunction(baseline))
            assert torch.equal(logits.grad[:, 0], torch.zeros(4))
            assert torch.isfinite(logits.grad).all()
