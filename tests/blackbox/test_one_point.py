"""One point: unbiased with a baseline that no direction has touched, and less noisy than without."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import SPSA, OnePoint
from thalweg.errors import NonFiniteError
from thalweg.noise import Key
from thalweg.problems import Quadratic

SIGMAS = 5


@pytest.mark.parametrize(
    "rule", [SPSA(scale=0.1, side="one"), OnePoint(scale=0.1), OnePoint(2, 0.1, "sphere")]
)
def test_one_point_is_unbiased(rule):
    problem = Quadratic.from_spectrum(torch.linspace(0.5, 2.0, 4), seed=1)
    point = torch.ones(4, dtype=torch.float64, requires_grad=True)
    exact = problem.gradient(point)
    found = torch.stack(
        [rule.estimate(lambda: problem.loss(point), [point], Key(seed)).gradients[0] for seed in range(4000)]
    )
    error = found.std(0) / math.sqrt(len(found))
    assert error.max() < 0.5 * exact.norm()
    assert ((found.mean(0) - exact) / error).abs().max() < SIGMAS


def test_a_running_baseline_takes_out_what_all_losses_share():
    point = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def spread(rule):
        found = [
            rule.estimate(lambda: 100 + (point**2).sum(), [point], Key(seed)).gradients[0]
            for seed in range(300)
        ]
        return torch.stack(found).std(0).max()

    # without a baseline the noise is (loss / scale): a hundred times that of the slope
    assert spread(OnePoint(scale=0.1, decay=None)) > 20 * spread(OnePoint(scale=0.1))
    assert spread(OnePoint(scale=0.1, decay=None)) == spread(SPSA(scale=0.1, side="one"))


def test_the_baseline_follows_the_losses_and_counts_its_evaluations():
    weight = torch.zeros(2, requires_grad=True)
    rule = OnePoint(samples=2, scale=0.5, decay=0.75)
    assert rule.state_dict() == {"baseline": None}
    # with entries of +-1 the loss is 0.5 wherever it is evaluated but at the start
    first = rule.estimate(lambda: (weight**2).sum(), [weight], Key(0))
    assert first.evaluations == 3
    assert rule.state_dict() == {"baseline": 0.25 * 0.5}
    second = rule.estimate(lambda: (weight**2).sum(), [weight], Key(1))
    assert second.evaluations == 2
    assert rule.state_dict() == {"baseline": 0.75 * 0.125 + 0.25 * 0.5}
    other = OnePoint(samples=2, scale=0.5, decay=0.75)
    other.load_state_dict(rule.state_dict())
    a, b = (each.estimate(lambda: (weight**2).sum(), [weight], Key(2)) for each in (rule, other))
    assert torch.equal(a.gradients[0], b.gradients[0])


def test_a_failure_leaves_the_baseline():
    weight = torch.zeros(2, requires_grad=True)
    rule = OnePoint()
    rule.estimate(lambda: (weight**2).sum(), [weight], Key(0))
    before = rule.state_dict()
    with pytest.raises(NonFiniteError, match="sample 0"):
        rule.estimate(lambda: weight.sum() + float("inf"), [weight], Key(1))
    assert rule.state_dict() == before


def test_fake_tensors_leave_no_baseline_behind():
    with FakeTensorMode():
        net = nn.Linear(3, 2)
        rule = OnePoint()
        found = rule.estimate(lambda: net(torch.ones(2, 3)).mean(), list(net.parameters()), Key(0))
    assert found.gradients[0].shape == (2, 3)
    assert rule.baseline is None


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: OnePoint(samples=0), "samples"),
        (lambda: OnePoint(scale=-1.0), "scale"),
        (lambda: OnePoint(directions="x"), "directions"),
        (lambda: OnePoint(restore="x"), "restore"),
        (lambda: OnePoint(decay=1.0), "decay"),
        (lambda: OnePoint(decay=-0.1), "decay"),
        (lambda: OnePoint(decay="x"), "decay"),
        (lambda: OnePoint().load_state_dict({}), "state"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        make()
