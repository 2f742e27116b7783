"""PGPE: the step of evotorch on the same samples, invariant ranks, and scales that learn."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg.blackbox import PGPE
from thalweg.blackbox.directions import direction
from thalweg.errors import ArgumentError, NonFiniteError
from thalweg.noise import Key


@pytest.mark.parametrize("weights", ["ranks", "raw"])
@pytest.mark.parametrize("max_change", [0.2, 0.01])
def test_parity_with_a_pgpe_step_of_evotorch_on_the_same_samples(weights, max_change):
    distributions = pytest.importorskip("evotorch.distributions")
    from evotorch.tools import modify_tensor
    from evotorch.tools.ranking import rank

    torch.manual_seed(3)
    point = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, dtype=torch.float64)
    rule = PGPE(samples=5, scale=0.3, rate=0.4, weights=weights, max_change=max_change)

    def loss(x):
        return ((x - target) ** 4).sum(-1)

    mean, scale = point.detach().clone(), torch.full_like(target, 0.3)
    for step in range(4):
        key = Key(1, step)
        noise = torch.stack([scale * direction("gaussian", mean, key, s, 0) for s in range(5)])
        samples = torch.stack([mean + noise, mean - noise], 1).view(10, 7)
        peer = distributions.SymmetricSeparableGaussian(
            {
                "mu": mean,
                "sigma": scale,
                "divide_mu_grad_by": "num_directions",
                "divide_sigma_grad_by": "num_directions",
            }
        )
        method = "centered" if weights == "ranks" else "raw"
        utilities = rank(loss(samples), method, higher_is_better=False)
        up = peer._compute_gradients(samples, utilities, method)
        found = rule.estimate(lambda: loss(point), [point], key)
        torch.testing.assert_close(found.gradients[0], -up["mu"], rtol=1e-10, atol=1e-12)
        scale = modify_tensor(scale, scale + 0.4 * up["sigma"], max_change=max_change)
        torch.testing.assert_close(rule.scales[0], scale, rtol=1e-10, atol=1e-12)
        mean = mean - 0.5 * found.gradients[0]
        with torch.no_grad():
            point.copy_(mean)


def test_ranks_ignore_monotone_transforms_of_the_loss():
    found = []
    for transform in (lambda f: f, torch.exp, lambda f: f**3 - 7):
        point = torch.ones(5, dtype=torch.float64, requires_grad=True)
        rule = PGPE(samples=6)
        gradient = rule.estimate(lambda t=transform, p=point: t((p**2).sum()), [point], Key(0)).gradients[0]
        found.append((gradient, rule.scales[0]))
    assert found[0][0].abs().max() > 0
    for gradient, scale in found[1:]:
        assert torch.equal(gradient, found[0][0])
        assert torch.equal(scale, found[0][1])


def test_scales_shrink_where_the_loss_is_steep():
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rule = PGPE(samples=16, scale=1.0, rate=0.2)
    steep = torch.tensor([100.0, 0.01], dtype=torch.float64)
    for step in range(30):
        rule.estimate(lambda: (steep * point**2).sum(), [point], Key(0, step))
    assert rule.scales[0][0] < 0.5
    assert rule.scales[0][0] < 0.7 * rule.scales[0][1]


def test_it_learns_with_any_optimizer_and_its_state_goes_on():
    weight = torch.full((3,), 3.0, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=2.0)
    rule = PGPE(samples=8, scale=0.3)
    for step in range(60):
        (weight.grad,) = rule.estimate(lambda: (weight**2).sum(), [weight], Key(0, step)).gradients
        optimizer.step()
    assert weight.detach().abs().max() < 0.5
    other = PGPE(samples=8, scale=9.0)
    other.load_state_dict(rule.state_dict())
    a, b = (each.estimate(lambda: (weight**2).sum(), [weight], Key(1)) for each in (rule, other))
    assert torch.equal(a.gradients[0], b.gradients[0])
    assert torch.equal(rule.scales[0], other.scales[0])


def test_a_failure_leaves_weights_and_scales_and_other_parameters_are_refused():
    weight = torch.zeros(2, requires_grad=True)
    rule = PGPE()
    rule.estimate(lambda: (weight**2).sum(), [weight], Key(0))
    before = rule.scales[0].clone()
    with pytest.raises(NonFiniteError, match="sample 0"):
        rule.estimate(lambda: weight.sum() + float("inf"), [weight], Key(1))
    assert torch.equal(rule.scales[0], before)
    assert not weight.detach().any()
    with pytest.raises(ArgumentError, match=r"^parameters"):
        rule.estimate(lambda: weight.sum(), [torch.zeros(3, requires_grad=True)], Key(1))


def test_fake_tensors_leave_no_scales_behind():
    with FakeTensorMode():
        net = nn.Linear(3, 2)
        rule = PGPE(samples=2)
        found = rule.estimate(lambda: net(torch.ones(2, 3)).mean(), list(net.parameters()), Key(0))
    assert found.gradients[0].shape == (2, 3)
    assert rule.scales == ()


def test_bfloat16_keeps_scales_in_float32():
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    rule = PGPE(samples=2)
    assert rule.estimate(lambda: (weight**2).sum(), [weight], Key(0)).gradients[0].dtype == torch.bfloat16
    assert rule.scales[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: PGPE(samples=0), "samples"),
        (lambda: PGPE(scale=0.0), "scale"),
        (lambda: PGPE(rate=-1.0), "rate"),
        (lambda: PGPE(weights="sign"), "weights"),
        (lambda: PGPE(max_change=1.0), "max_change"),
        (lambda: PGPE().load_state_dict([]), "state"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        make()
