"""The probability flow by ODE solvers: coordinates, policies, likelihood."""

import math

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError
from thalweg.flows import (
    DDIM,
    KINDS,
    Cosine,
    Field,
    Straight,
    VarianceExploding,
    VariancePreserving,
    log_likelihood,
    probability_flow,
    sample,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture
from thalweg.rollouts import Backsolve, Checkpointed, Discrete, Reversible
from thalweg.step import Backprop

MIXTURE = GaussianMixture.drawn(3, 2, seed=1)
PATHS = {"cosine": Cosine(), "straight": Straight(), "vp": VariancePreserving(), "ve": VarianceExploding(5.0)}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))


@every_path
@pytest.mark.parametrize("coordinates", ["time", "noise", "data"])
def test_every_coordinate_solves_the_same_equation(path, coordinates):
    gaussian = GaussianMixture.drawn(1, 2, seed=2)
    x = torch.randn(5, 2, dtype=torch.float64)
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    for kind in KINDS:
        found = probability_flow(
            gaussian.field(path, kind),
            x,
            times,
            method="dopri5",
            coordinates=coordinates,
            rtol=1e-9,
            atol=1e-10,
        )
        for state, t in zip(found, times.tolist()):
            exact = gaussian.flow(x, 0.9, t, path)
            torch.testing.assert_close(state, exact, rtol=1e-6, atol=1e-7)


@every_path
def test_euler_in_the_coordinates_of_adjoint_dpm_is_ddim(path):
    """Euler on x / alpha against sigma / alpha, and on x / sigma against alpha / sigma."""
    x = torch.randn(5, 2, dtype=torch.float64)
    times = torch.tensor([0.9, 0.7, 0.4, 0.2], dtype=torch.float64)
    field = MIXTURE.field(path, "noise")
    expected = sample(field, x, times, solver=DDIM())
    for coordinates in ("noise", "data"):
        found = probability_flow(field, x, times, method="euler", coordinates=coordinates)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth_2", 2), ("rk4", 4)]
)
def test_methods_converge_at_their_order(method, order):
    gaussian, path = GaussianMixture.drawn(1, 2, seed=2), Cosine()
    x = torch.randn(20, 2, dtype=torch.float64)
    ends = torch.tensor([0.95, 0.1], dtype=torch.float64)

    def error(steps):
        found = probability_flow(gaussian.field(path), x, ends, method=method, steps_between=steps)[-1]
        return float((found - gaussian.flow(x, 0.95, 0.1, path)).norm())

    assert abs(math.log2(error(60) / error(120)) - order) < 0.25


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x, t, c):
        return self.inner(torch.cat([x, t[:, None], c.expand(len(x), 1)], 1))


def gradients(method, policy, coordinates, steps=12):
    torch.manual_seed(0)
    net = Small()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    c = torch.ones(1, dtype=torch.float64, requires_grad=True)
    times = torch.linspace(0.9, 0.1, steps, dtype=torch.float64)
    field = Field(net, Cosine(), "noise")
    out = probability_flow(
        field, x, times, method=method, coordinates=coordinates, gradient=policy, conditions={"c": c}
    )
    return torch.autograd.grad((out[-1] ** 3).sum(), [x, c, *net.parameters()])


@pytest.mark.parametrize("coordinates", ["time", "noise", "data"])
@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("euler", Discrete()),
        ("heun", Discrete()),
        ("rk4", Discrete()),
        ("dopri5", Discrete()),
        ("adams_bashforth_2", Discrete()),
        ("euler", Checkpointed(slots=2)),
        ("heun", Checkpointed(segments=3)),
        ("reversible_heun", Reversible()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_exact_policy_agrees_with_backprop(method, policy, coordinates):
    expected = gradients(method, Backprop(), coordinates)
    found = gradients(method, policy, coordinates)
    for mine, exact in zip(found, expected):
        torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-9)


def test_the_continuous_adjoint_comes_closer_with_more_steps():
    def error(steps):
        pairs = zip(
            gradients("heun", Backsolve(), "noise", steps), gradients("heun", Backprop(), "noise", steps)
        )
        return float(sum((a - b).square().sum() for a, b in pairs).sqrt())

    assert error(80) < 0.2 * error(20)


@every_path
def test_likelihood_by_change_of_variables_is_the_density(path):
    data, _ = MIXTURE.sample(12, Key(0))
    start = 0.02 if isinstance(path, VariancePreserving) else 0.0
    times = torch.tensor([start, 0.999], dtype=torch.float64)
    found = log_likelihood(
        MIXTURE.field(path), data, times, steps_between=400,
        log_prior=lambda x: MIXTURE.log_density(x, 0.999, path),
    )  # fmt: skip
    torch.testing.assert_close(found, MIXTURE.log_density(data, start, path), rtol=1e-5, atol=1e-5)


def test_the_default_prior_is_the_noise_at_the_end():
    data, _ = MIXTURE.sample(12, Key(0))
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = log_likelihood(MIXTURE.field(Straight()), data, times, steps_between=300)
    torch.testing.assert_close(found, MIXTURE.log_density(data, 0.0, Straight()), rtol=1e-6, atol=1e-6)


def test_hutchinson_is_unbiased_over_its_probes():
    """In two dimensions the four sign vectors are all there is: their mean is the trace."""
    from thalweg.flows.probability_flow import _divergence

    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    velocity = MIXTURE.predict("velocity", x, 0.4, Cosine())
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    probes = signs[:, None].expand(4, 5, 2)
    exact = _divergence(velocity, x, None, False)
    torch.testing.assert_close(_divergence(velocity, x, probes, False), exact, rtol=1e-12, atol=1e-12)


def test_estimated_likelihoods_scatter_around_the_exact_one():
    data = MIXTURE.sample(1, Key(0))[0].expand(400, 2).contiguous()
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    field = MIXTURE.field(Straight())
    found = log_likelihood(field, data, times, trace="hutchinson", probes=2, steps_between=100, key=Key(3))
    exact = log_likelihood(field, data[:1], times, steps_between=100)
    assert found.std() > 0
    assert abs(float((found.mean() - exact).detach())) < 5 * float(found.detach().std()) / 20


def test_likelihood_can_be_trained_through():
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    field = Field(lambda x, t: scale * torch.sin(x), Straight(), "velocity")
    data = torch.randn(4, 2, dtype=torch.float64)

    def value(scale_, policy=None):
        with torch.no_grad():
            scale.copy_(scale_)
        return log_likelihood(
            field, data, torch.tensor([0.0, 1.0]).double(), steps_between=5, gradient=policy
        ).sum()

    (gradient,) = torch.autograd.grad(value(0.3), scale)
    h = 1e-5
    with torch.no_grad():
        slope = (value(0.3 + h) - value(0.3 - h)) / (2 * h)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-6)
    for policy in (Discrete(), Checkpointed(slots=2)):
        (found,) = torch.autograd.grad(value(0.3, policy), scale)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"coordinates": "space"}, "coordinates"),
        ({"coordinates": "noise", "times": torch.tensor([1.0, 0.5])}, "times"),
        ({"coordinates": "data", "times": torch.tensor([0.5, 0.0])}, "times"),
        ({"times": torch.tensor([1.5, 0.0])}, "t"),
    ],
    ids=["coordinates", "no_data", "no_noise", "late"],
)
def test_bad_calls_are_refused(change, argument):
    given = {"times": torch.tensor([0.9, 0.1]), **change}
    with pytest.raises(ArgumentError) as refusal:
        probability_flow(MIXTURE.field(Straight()), torch.zeros(2, 2), given.pop("times"), **given)
    assert refusal.value.argument == argument


def test_likelihood_refuses_falling_times_and_unknown_traces():
    field, data = MIXTURE.field(Straight()), torch.zeros(2, 2)
    with pytest.raises(ArgumentError, match="rising"):
        log_likelihood(field, data, torch.tensor([1.0, 0.0]))
    with pytest.raises(ArgumentError, match="trace"):
        log_likelihood(field, data, torch.tensor([0.0, 1.0]), trace="guess")
