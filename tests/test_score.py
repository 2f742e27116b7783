"""Score functions against autograd, and baselines against their definition."""

import math

import pytest
import torch

from thalweg.score import (
    bernoulli_log_probability,
    bernoulli_score,
    centred,
    gaussian_score,
    leave_one_out,
    minimum_variance_baseline,
)


def test_bernoulli_matches_torch_distributions():
    logits = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    for outcome in (torch.zeros_like(logits), torch.ones_like(logits)):
        value = bernoulli_log_probability(outcome, logits)
        torch.testing.assert_close(value, torch.distributions.Bernoulli(logits=logits).log_prob(outcome))
        (slope,) = torch.autograd.grad(value.sum(), logits)
        torch.testing.assert_close(bernoulli_score(outcome, logits.detach()), slope)


def test_bernoulli_saturates_without_infinities():
    logits = torch.tensor([-1e4, 1e4])
    assert torch.equal(
        bernoulli_log_probability(torch.tensor([1.0, 0.0]), logits), torch.tensor([-1e4, -1e4])
    )


def test_gaussian_matches_torch_distributions():
    mean = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    outcome = torch.tensor([1.0, 3.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(torch.distributions.Normal(mean, 0.3).log_prob(outcome).sum(), mean)
    torch.testing.assert_close(gaussian_score(outcome, mean.detach(), 0.3), slope)


def test_the_score_has_mean_zero():
    p = torch.sigmoid(torch.tensor(0.7))
    scores = bernoulli_score(torch.tensor([0.0, 1.0]), torch.full((2,), 0.7))
    assert abs((1 - p) * scores[0] + p * scores[1]) < 1e-7


def test_the_mean_baseline_leaves_the_own_loss_out():
    losses = torch.randn(5, dtype=torch.float64)
    expected = [losses[b] - torch.cat([losses[:b], losses[b + 1 :]]).mean() for b in range(5)]
    torch.testing.assert_close(centred(losses, "mean"), torch.stack(expected))
    assert centred(losses) is losses


def test_leave_one_out_leaves_the_own_run_out():
    losses = torch.randn(4, 3, dtype=torch.float64)
    expected = [losses[k] - torch.cat([losses[:k], losses[k + 1 :]]).mean(0) for k in range(4)]
    torch.testing.assert_close(leave_one_out(losses), torch.stack(expected))


def test_the_minimum_variance_baseline_is_its_definition():
    score, losses = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    chances = torch.rand(6, dtype=torch.float64)
    for weights in (None, chances):
        each = torch.ones(6, dtype=torch.float64) if weights is None else weights
        squares = each[:, None, None] * score**2
        expected = (squares * losses[:, None, None]).sum(0) / squares.sum(0)
        torch.testing.assert_close(minimum_variance_baseline(score, losses, weights), expected)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: centred(torch.ones(1), "mean"), "losses"),
        (lambda: centred(torch.ones(2, 2)), "losses"),
        (lambda: centred(torch.ones(2, dtype=torch.long)), "losses"),
        (lambda: centred(torch.ones(2), "median"), "baseline"),
        (lambda: leave_one_out(torch.ones(1, 2)), "losses"),
        (lambda: leave_one_out(torch.ones(2)), "losses"),
        (lambda: leave_one_out(torch.ones(2, 2, dtype=torch.long)), "losses"),
        (lambda: minimum_variance_baseline(torch.ones(1, 2), torch.ones(1), others=True), "score"),
        (lambda: minimum_variance_baseline([1.0], torch.ones(1)), "score"),
        (lambda: bernoulli_score(torch.ones(2), torch.ones(3)), "outcome"),
        (lambda: bernoulli_score(torch.ones(3), [1.0]), "logits"),
        (lambda: gaussian_score(torch.ones(2), torch.ones(2, 1), math.e), "outcome"),
        (lambda: gaussian_score(torch.ones(2), torch.ones(2), 0.0), "scale"),
        (lambda: gaussian_score(torch.ones(2), torch.ones(2), -1.0), "scale"),
        (lambda: gaussian_score(torch.ones(2), torch.ones(2), "1"), "scale"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        call()
