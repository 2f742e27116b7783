"""Exact checks that SPSA, forward gradients and evolution strategies must all pass."""

import math
import pickle

import pytest
import torch
from torch import nn

from thalweg.blackbox import SPSA, EvolutionStrategies, ForwardGradient, LowRank, Sparse
from thalweg.blackbox.directions import combine, direction
from thalweg.noise import Key
from thalweg.problems import Quadratic
from thalweg.step import backward

DIMENSION = 30
SIGMAS = 5


def quadratic_at_a_point(dimension=DIMENSION):
    problem = Quadratic.from_spectrum(torch.linspace(0.5, 2.0, dimension), seed=1)
    point = torch.ones(dimension, dtype=torch.float64, requires_grad=True)
    return problem, point, problem.gradient(point)


def estimates(rule, closure, point, count):
    return torch.stack([rule.estimate(closure, [point], Key(seed)).gradients[0] for seed in range(count)])


@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_central_difference_is_exact_on_quadratics_for_any_scale(scale, directions):
    problem, point, exact = quadratic_at_a_point()
    rule = SPSA(scale=scale, directions=directions)
    estimate = rule.estimate(lambda: problem.loss(point), [point], Key(3))
    z = direction(directions, point.detach(), Key(3), 0, 0)
    tolerance = 1e-12 * (1 + scale**2) / scale * 100
    torch.testing.assert_close(estimate.gradients[0], (exact @ z) * z, rtol=0, atol=tolerance)


@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
def test_forward_gradient_is_the_limit_of_the_central_estimate(directions):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    parameters = list(net.parameters())

    def closure():
        return net(x).pow(2).mean(1)

    forward = ForwardGradient(2, directions).estimate(closure, parameters, Key(5))
    errors = []
    for scale in (1e-2, 1e-3):
        central = SPSA(2, scale, directions).estimate(closure, parameters, Key(5))
        errors.append(max((a - b).abs().max() for a, b in zip(forward.gradients, central.gradients)))
    assert errors[1] < 1e-4
    # the error of a central difference is of second order
    assert 80 < errors[0] / errors[1] < 120


class Basis:
    """A pattern of one's own: the columns of an orthonormal matrix, one after another."""

    def __init__(self, columns):
        self.columns, self.weights = columns, (1.0,) * len(columns)

    def bind(self, parameters, key, samples):
        return self

    def part(self, sample, index, value):
        return self.columns[sample].clone()


def test_sum_over_a_full_orthonormal_set_of_directions_is_the_gradient():
    problem, point, exact = quadratic_at_a_point(6)
    basis = Basis(torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q.T)
    for rule in (SPSA(directions=basis), ForwardGradient(directions=basis)):
        estimate = rule.estimate(lambda: problem.loss(point), [point], Key(0))
        torch.testing.assert_close(estimate.gradients[0], exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "second_moment"),
    [
        (SPSA(directions="gaussian"), DIMENSION + 2),
        (SPSA(directions="rademacher"), DIMENSION),
        (SPSA(directions="sphere"), DIMENSION),
        (SPSA(samples=5, directions="sphere"), (DIMENSION + 5 - 1) / 5),
        (SPSA(samples=5, directions="gaussian"), (DIMENSION + 5 + 1) / 5),
        (SPSA(samples=5, directions="rademacher"), (DIMENSION + 5 - 1) / 5),
        (ForwardGradient(directions="gaussian"), DIMENSION + 2),
        (ForwardGradient(directions="rademacher"), DIMENSION),
    ],
)
def test_second_moment_laws(rule, second_moment):
    problem, point, exact = quadratic_at_a_point()
    found = estimates(rule, lambda: problem.loss(point), point, 2000)
    ratios = found.pow(2).sum(1) / exact.pow(2).sum()
    error = ratios.std() / math.sqrt(len(ratios))
    assert error < 0.05 * second_moment
    assert abs(ratios.mean() - second_moment) < SIGMAS * error
    # and the mean is the gradient, entry by entry
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))
    assert z.abs().max() < SIGMAS


@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
def test_mean_cosine_law(directions):
    dimension = 200
    problem, point, exact = quadratic_at_a_point(dimension)
    found = estimates(SPSA(directions=directions), lambda: problem.loss(point), point, 2000)
    cosines = torch.cosine_similarity(found, exact[None]).abs()
    error = cosines.std() / math.sqrt(len(cosines))
    law = math.sqrt(2 / (math.pi * dimension))
    # the law is that of large d; its own error is of relative size 1/d
    assert abs(cosines.mean() - law) < SIGMAS * error + law / dimension


@pytest.mark.parametrize(("factor", "falls"), [(0.9, True), (1.1, False)])
def test_stability_threshold(factor, falls):
    dimension, curvature = 20, 3.0
    rate = factor * 2 / (curvature * (dimension + 2))
    point = torch.ones(dimension, dtype=torch.float64, requires_grad=True)
    rule = SPSA(directions="gaussian")
    found = estimates(rule, lambda: 0.5 * curvature * (point**2).sum(), point, 20000)
    ratios = (point.detach() - rate * found).pow(2).sum(1) / dimension
    law = 1 - 2 * rate * curvature + rate**2 * curvature**2 * (dimension + 2)
    error = ratios.std() / math.sqrt(len(ratios))
    assert abs(ratios.mean() - law) < SIGMAS * error
    assert (law < 1) == falls
    assert (ratios.mean() + SIGMAS * error < 1) if falls else (ratios.mean() - SIGMAS * error > 1)


def test_evolution_strategies_with_raw_antithetic_weights_are_spsa():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    parameters = list(net.parameters())
    evolution = EvolutionStrategies(samples=4, scale=0.01)
    a = evolution.estimate(lambda: net(x).pow(2).mean(), parameters, Key(1))
    b = SPSA(4, 0.01, "gaussian").estimate(lambda: net(x).pow(2).mean(), parameters, Key(1))
    assert a.evaluations == b.evaluations == 8
    torch.testing.assert_close(a.loss, b.loss)
    for one, other in zip(a.gradients, b.gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("antithetic", [True, False])
def test_evolution_strategies_with_ranks_ignore_monotone_transforms(antithetic):
    point = torch.ones(5, dtype=torch.float64, requires_grad=True)
    rule = EvolutionStrategies(samples=6, scale=0.1, antithetic=antithetic, weights="ranks")
    plain = rule.estimate(lambda: (point**2).sum(), [point], Key(0))
    assert plain.evaluations == (12 if antithetic else 6)
    assert plain.gradients[0].abs().max() > 0
    for transform in (torch.exp, lambda f: 1000 * f - 3, lambda f: f**3):
        other = rule.estimate(lambda t=transform: t((point**2).sum()), [point], Key(0))
        assert torch.equal(plain.gradients[0], other.gradients[0])


def test_evolution_strategies_give_equal_losses_equal_ranks():
    point = torch.ones(5, requires_grad=True)
    rule = EvolutionStrategies(samples=6, antithetic=False, weights="ranks")
    assert not rule.estimate(lambda: 0 * point.sum(), [point], Key(0)).gradients[0].any()


def test_evolution_strategies_without_pairs_are_unbiased():
    problem, point, exact = quadratic_at_a_point(4)
    rule = EvolutionStrategies(samples=8, scale=0.5, antithetic=False)
    found = estimates(rule, lambda: problem.loss(point), point, 4000)
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))
    assert z.abs().max() < SIGMAS


def test_one_sided_differences_err_at_first_order():
    point = torch.ones(5, dtype=torch.float64, requires_grad=True)
    rule = SPSA(samples=2, scale=0.1, side="forward")
    estimate = rule.estimate(lambda: (point**2).sum(), [point], Key(0))
    assert estimate.evaluations == 3
    assert estimate.loss == 5
    two_sided = SPSA(samples=2, scale=0.1).estimate(lambda: (point**2).sum(), [point], Key(0))
    zs = [direction("rademacher", point.detach(), Key(0), sample, 0) for sample in range(2)]
    torch.testing.assert_close(
        estimate.gradients[0] - two_sided.gradients[0], sum(0.1 * 5 * z for z in zs) / 2
    )


@pytest.mark.parametrize("directions", ["rademacher", "gaussian"])
def test_forward_gradient_equals_torch_func_jvp(directions):
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    parameters = dict(net.named_parameters())
    primals = {name: p.detach() for name, p in parameters.items()}
    tangents = {
        name: direction(directions, p, Key(7), 0, index) for index, (name, p) in enumerate(primals.items())
    }

    def loss(values):
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    value, slope = torch.func.jvp(loss, (primals,), (tangents,))
    found = ForwardGradient(directions=directions).estimate(
        lambda: nn.functional.cross_entropy(net(x), y), list(parameters.values()), Key(7)
    )
    torch.testing.assert_close(found.loss, value)
    for gradient, tangent in zip(found.gradients, tangents.values()):
        torch.testing.assert_close(gradient, slope * tangent)


@pytest.mark.parametrize("rule", [SPSA(), ForwardGradient(), EvolutionStrategies()])
def test_per_example_losses_mean_their_mean(rule):
    torch.manual_seed(0)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    vector = rule.estimate(lambda: (x @ weight) ** 2, [weight], Key(0))
    scalar = rule.estimate(lambda: ((x @ weight) ** 2).mean(), [weight], Key(0))
    torch.testing.assert_close(vector.gradients[0], scalar.gradients[0])


@pytest.mark.parametrize(
    "rule",
    [
        SPSA(2, 0.1, "gaussian", "forward", "swap"),
        SPSA(directions=Sparse(0.5, of=LowRank(3))),
        ForwardGradient(3),
        EvolutionStrategies(4),
    ],
)
def test_policies_pickle_print_and_compare(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert eval(repr(rule)) == rule
    assert rule != type(rule)()


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: SPSA(samples=0), "samples"),
        (lambda: SPSA(samples=1.5), "samples"),
        (lambda: SPSA(scale=0.0), "scale"),
        (lambda: SPSA(scale=float("nan")), "scale"),
        (lambda: SPSA(directions="cube"), "directions"),
        (lambda: SPSA(directions=LowRank), "directions"),
        (lambda: SPSA(directions=3), "directions"),
        (lambda: SPSA(directions=SPSA()), "directions"),
        (lambda: SPSA(weights="ranks"), "weights"),
        (lambda: SPSA(allow_drift=1), "allow_drift"),
        (lambda: SPSA(restore="inplace", directions=Sparse(keep="largest")), "restore"),
        (lambda: SPSA(side="backward"), "side"),
        (lambda: SPSA(restore="move"), "restore"),
        (lambda: ForwardGradient(samples=True), "samples"),
        (lambda: ForwardGradient(directions="x"), "directions"),
        (lambda: EvolutionStrategies(samples=1, antithetic=False, weights="ranks"), "samples"),
        (lambda: EvolutionStrategies(weights="sign"), "weights"),
        (lambda: EvolutionStrategies(antithetic=1), "antithetic"),
        (lambda: EvolutionStrategies(scale=-1.0), "scale"),
        (lambda: EvolutionStrategies(restore="inplace"), "restore"),
    ],
)
def test_bad_fields_are_refused_by_name(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        make()


@pytest.mark.parametrize("rule", [SPSA(), ForwardGradient(), EvolutionStrategies()])
@pytest.mark.parametrize("closure", [lambda: None, lambda: torch.ones(2, 2), lambda: torch.tensor(1)])
def test_bad_losses_are_refused_and_nothing_changes(rule, closure):
    weight = torch.randn(3, requires_grad=True)
    before = weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match="closure"):
        backward(closure, [weight], gradient=rule)
    assert torch.equal(weight.detach(), before)
    assert weight.grad is None
    assert weight.requires_grad


def test_two_parameters_of_one_shape_get_two_directions():
    one, two = (direction("gaussian", torch.empty(8), Key(0), 0, index) for index in (0, 1))
    assert not torch.equal(one, two)


def test_directions_of_few_bits_are_summed_in_many():
    like, count = torch.empty(64, dtype=torch.bfloat16), 40
    coefficients = [torch.tensor(1 / (3 + sample)) for sample in range(count)]
    (found,) = combine("gaussian", coefficients, [like], Key(0))
    drawn = [direction("gaussian", like, Key(0), sample, 0).double() for sample in range(count)]
    exact = sum(c.double() * z for c, z in zip(coefficients, drawn))
    assert torch.equal(found, exact.to(torch.bfloat16))
