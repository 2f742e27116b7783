"""REBAR and RELAX: exact moments by quadrature, several layers by sampling, and what they learn."""

import copy

import numpy as np
import pytest
import torch
from known_gradients import OneLayer, TwoLayersAndMasks, assert_mean_is, per_draw, standard_errors_off
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.noise import Key
from thalweg.step import backward
from thalweg.stochastic import BinaryNeuron, relax, tape
from thalweg.stochastic.arm import DisARM
from thalweg.stochastic.relax import REBAR, RELAX
from thalweg.stochastic.relaxation import conditional_relaxation, relaxation


class Squashed(nn.Module):
    """A control of relaxed logits that is smooth at both ends of the uniform numbers."""

    def __init__(self, units):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, units).double())

    def forward(self, z):
        return (torch.sigmoid(z) * self.weight).sum(-1) ** 2


def test_the_conditional_relaxation_is_the_free_one_given_its_sign():
    """Against the definition: u' below 1 - p for a zero, above for a one, through the logistic quantile."""
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)[:, None].requires_grad_()
    v = torch.linspace(0.01, 0.99, 33, dtype=torch.float64).expand(25, -1)
    p = torch.sigmoid(logits)
    for outcome, u in ((0.0, (1 - p) * v), (1.0, (1 - p) + p * v)):
        expected = logits + torch.log(u) - torch.log1p(-u)
        found = conditional_relaxation(logits.expand(-1, 33), torch.full_like(v, outcome), v)
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            *[torch.autograd.grad(each.sum(), logits, retain_graph=True) for each in (found, expected)]
        ):
            torch.testing.assert_close(a, b)
        assert ((found > 0) == bool(outcome)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relaxations_stay_finite_where_units_saturate(dtype):
    logits = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], dtype=dtype).requires_grad_()
    for number in (0.0, 0.5, 1 - torch.finfo(dtype).eps / 2):
        numbers = torch.full_like(logits, number)
        for z in (
            relaxation(logits, numbers),
            conditional_relaxation(logits, (logits.detach() > 0).to(dtype), numbers),
        ):
            (slope,) = torch.autograd.grad(z.sum(), logits)
            assert torch.isfinite(z).all()
            assert torch.isfinite(slope).all()


def quadrature(rule, gates, points, monkeypatch):
    """Mean, variance and exact gradient, integrated over both uniform numbers of all units."""
    x, w = [torch.tensor(column) for column in np.polynomial.legendre.leggauss(points)]
    first, second = [], []
    for p in OneLayer(gates, 1).probabilities:
        first.append(
            (torch.cat([p * (x + 1) / 2, p + (1 - p) * (x + 1) / 2]), torch.cat([p * w, (1 - p) * w]) / 2)
        )
        second.append(((x + 1) / 2, w / 2))
    columns = [*first, *second]
    numbers = torch.cartesian_prod(*[nodes for nodes, _ in columns]).view(-1, 2 * gates)
    weights = torch.cartesian_prod(*[each for _, each in columns]).view(-1, 2 * gates).prod(1, keepdim=True)
    problem = OneLayer(gates, len(numbers))
    with monkeypatch.context() as patch:
        patch.setattr(tape, "uniform_numbers", lambda logits, key: numbers[:, :gates])
        patch.setattr(relax, "uniform_numbers", lambda logits, key: numbers[:, gates:])
        draws = problem.draws(rule)
    mean = (weights * draws).sum(0)
    return mean, (weights * (draws - mean) ** 2).sum(0), problem.exact


RULES = {
    "rebar": lambda gates: REBAR(temperature=0.5),
    "rebar scaled": lambda gates: REBAR(temperature=0.25, scale=-0.7),
    "relax": lambda gates: RELAX(Squashed(gates)),
    "relax alone": lambda gates: RELAX(Squashed(gates), relaxed_loss=False),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("gates", "points", "off"), [(1, 60, 1e-10), (2, 12, 1e-6)])
def test_e7_rebar_and_relax_are_unbiased(name, gates, points, off, monkeypatch):
    mean, _, exact = quadrature(RULES[name](gates).eval(), gates, points, monkeypatch)
    assert (mean - exact).abs().max() < off


def test_e7_without_the_ratio_path_rebar_is_biased(monkeypatch):
    """The negative twin of the check above: u' taken as if it did not depend on the logits."""

    def dropped(logits, outcome, numbers):
        return logits + (conditional_relaxation(logits, outcome, numbers) - logits).detach()

    monkeypatch.setattr(relax, "conditional_relaxation", dropped)
    mean, _, exact = quadrature(REBAR().eval(), 1, 60, monkeypatch)
    assert (mean - exact).abs().max() > 0.1 * exact.abs().max()
    problem = OneLayer(4, 100_000)
    assert standard_errors_off(problem.draws(REBAR().eval()), problem.exact) > 20


@pytest.mark.parametrize("name", [*RULES, "learning"])
def test_e7_unbiased_through_two_layers_and_a_random_mask(name):
    rule = REBAR() if name == "learning" else RULES[name](2).eval()
    if isinstance(rule, RELAX):
        rule = RELAX([Squashed(2), Squashed(2)], relaxed_loss=rule.relaxed_loss).eval()
    problem = TwoLayersAndMasks(200_000)
    for draws, exact in zip(per_draw(rule, problem, problem.leaves), problem.exact()):
        assert_mean_is(draws, exact, 0.03)


def test_hard_units_behind_a_relaxed_one_would_be_biased(monkeypatch):
    """Why the relaxed runs relax all that lies behind: the check above sees the shortcut."""

    def only_here(self, seen, index, relaxed):
        def decide(call, logits, numbers):
            if call == index:
                return torch.sigmoid(relaxed / 0.5)
            return seen.outcomes[call] if call < index else tape.fires(logits, numbers)

        return decide

    monkeypatch.setattr(REBAR, "_relaxing", only_here)
    problem = TwoLayersAndMasks(200_000)
    found = zip(per_draw(REBAR().eval(), problem, problem.leaves), problem.exact())
    assert max(standard_errors_off(draws, exact) for draws, exact in found) > 10


@pytest.mark.parametrize("name", RULES)
def test_what_the_rule_learns_is_the_gradient_of_its_mean_square(name):
    """Against central differences over the same random numbers, for every parameter of the rule."""
    rule = RULES[name](3).double()
    problem = OneLayer(3, 500)

    def mean_square():
        torch.manual_seed(1)
        return problem.draws(rule).square().sum(1).mean()

    mean_square()
    learned = {key: p.grad.clone() for key, p in rule.named_parameters() if p.grad is not None}
    assert set(learned) >= {"scale"}
    assert ("log_temperature" in learned) == (name != "relax alone")
    for key, parameter in rule.named_parameters():
        for index in np.ndindex(tuple(parameter.shape)):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[index] += step
                values.append(mean_square())
                with torch.no_grad():
                    parameter[index] -= step
            slope = (values[0] - values[1]) / 2e-5
            expected = learned[key][index] if key in learned else torch.zeros(())
            torch.testing.assert_close(expected, slope.to(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["rebar", "relax", "relax alone"])
def test_learning_lowers_the_variance(name):
    rule = RULES[name](5).double() if name != "rebar" else REBAR(temperature=3.0, scale=0.3)
    before = OneLayer(5, 20_000).draws(copy.deepcopy(rule).eval()).var(0).sum()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
    problem = OneLayer(5, 200)
    for _ in range(100):
        optimizer.zero_grad()
        problem.draws(rule)
        optimizer.step()
    after = OneLayer(5, 20_000).draws(rule.eval()).var(0).sum()
    assert after < 0.8 * before


def body():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 6), BinaryNeuron(gradient=None), nn.Dropout(0.3)),
        *(nn.Linear(6, 5), BinaryNeuron(gradient=None), nn.Linear(5, 3), nn.Tanh()),
    )


def two_controls():
    torch.manual_seed(1)
    return RELAX([nn.Linear(6, 1), nn.Linear(5, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [REBAR, two_controls], ids=["rebar", "relax"])
def test_checkpoint_and_compile_draw_the_same_bits_also_twice_differentiated(make, dtype):
    """Bits, gradients, and what the rule itself learns: a second derivative through the closure."""
    net, x = body().to(dtype), torch.randn(8, 4, dtype=dtype)
    found = []
    compiled = torch.compile(net, backend="aot_eager")
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False), compiled):
        rule = make()
        torch.manual_seed(2)
        estimate = rule.estimate(lambda r=run: r(x).pow(2).mean(1), list(net.parameters()), Key(0))
        found.append([estimate.loss, *estimate.gradients, *(p.grad for p in rule.parameters())])
    assert all(torch.isfinite(each).all() for each in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_evaluations_and_the_random_state():
    calls = []

    def counted():
        calls.append(torch.get_rng_state())
        return problem()

    for problem, rule, expected in (
        (OneLayer(3, 8), REBAR(), 3),
        (TwoLayersAndMasks(8), REBAR(), 5),
        (OneLayer(3, 8), RELAX(Squashed(3), relaxed_loss=False), 1),
    ):
        calls.clear()
        torch.manual_seed(4)
        leaves = [problem.logits] if isinstance(problem, OneLayer) else problem.leaves
        found = rule.estimate(counted, leaves, Key(0))
        after = torch.rand(1)
        assert found.evaluations == len(calls) == expected
        torch.manual_seed(4)
        assert torch.equal(problem().mean(), found.loss)
        assert torch.equal(after, torch.rand(1))


def test_state_dict_and_evaluation_mode():
    rule = REBAR(temperature=0.3, scale=0.9)
    twin = REBAR()
    twin.load_state_dict(rule.state_dict())
    assert repr(twin) == repr(rule) == "REBAR(temperature=0.3, scale=0.9)"
    OneLayer(3, 8).draws(rule.eval())
    assert all(p.grad is None for p in rule.parameters())
    rule.train().requires_grad_(False)
    OneLayer(3, 8).draws(rule)
    assert all(p.grad is None for p in rule.parameters())


@pytest.mark.parametrize("make", [REBAR, lambda: RELAX(nn.Linear(2, 1))], ids=["rebar", "relax"])
@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda net, x: net(x).mean(), "one loss per example"),
        (lambda net, x: net[0](x).pow(2).sum(1), "at least one unit with gradient=None"),
        (lambda net, x: net(x).squeeze(1)[:3], r"random unit 0: expected logits of shape \(3, ...\)"),
        (lambda net, x: (net(x) > 0).float().squeeze(1), "have a derivative in relaxed units"),
        (lambda net, x: net(x).squeeze(1) / 0, "nan or infinite"),
    ],
    ids=["scalar", "no unit", "batch", "no derivative", "infinite"],
)
def test_wrong_closures_are_refused(make, closure, message):
    rule, net = make(), nn.Sequential(nn.Linear(3, 2), BinaryNeuron(gradient=None), nn.Linear(2, 1))
    with pytest.raises((ArgumentError, NonFiniteError), match=message):
        backward(lambda: closure(net, torch.randn(5, 3)), net.parameters(), gradient=rule)
    assert all(p.grad is None for p in [*net.parameters(), *rule.parameters()])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: REBAR(temperature=0.0), "temperature"),
        (lambda: REBAR(temperature="1"), "temperature"),
        (lambda: REBAR(scale=float("nan")), "scale"),
        (lambda: REBAR(scale=None), "scale"),
        (lambda: RELAX(lambda z: z.sum(1)), "control"),
        (lambda: RELAX([]), "control"),
        (lambda: RELAX(nn.Linear(2, 1), relaxed_loss=1), "relaxed_loss"),
        (lambda: OneLayer(3, 4).draws(RELAX(nn.Linear(3, 2).double())), "control"),
        (lambda: OneLayer(3, 4).draws(RELAX([Squashed(3), Squashed(3)])), "control"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, argument):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"^{argument}: expected"):
        call()


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        net, rule, x = body(), REBAR(), torch.randn(8, 4)
        found = rule.estimate(lambda: net(x).pow(2).mean(1), list(net.parameters()), Key(0))
    assert [g.shape for g in found.gradients] == [p.shape for p in net.parameters()]


def test_rebar_varies_less_than_disarm_on_a_smooth_loss():
    problem = OneLayer(5, 50_000)
    variances = {type(rule).__name__: problem.draws(rule).var(0).sum() for rule in (REBAR().eval(), DisARM())}
    assert variances["REBAR"] < variances["DisARM"]
