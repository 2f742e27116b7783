"""Samplers on the oracle: exact cases, equalities, orders, laws, and gradients by every policy."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    DDIM,
    EDM,
    AdamsBashforth,
    Cosine,
    DPMSolver2,
    DPMSolverPP2M,
    Euler,
    EulerMaruyama,
    Field,
    Heun,
    RungeKutta4,
    Straight,
    VarianceExploding,
    VariancePreserving,
    sample,
    time_grid,
)
from thalweg.flows.solvers import lagrange_integrals
from thalweg.noise import Key
from thalweg.problems import GaussianMixture
from thalweg.rollouts import Checkpointed, Last, Route, Skipped, Truncated
from thalweg.step import Backprop

MIXTURE = GaussianMixture.drawn(3, 2, seed=1)
SOLVERS = {
    "euler": Euler(),
    "heun": Heun(),
    "rk4": RungeKutta4(),
    "ddim": DDIM(),
    "ddim_eta": DDIM(eta=0.5),
    "ancestral": DDIM(eta=1.0),
    "dpm_solver_2": DPMSolver2(),
    "dpm_solver_pp_2m": DPMSolverPP2M(),
    "sde_dpm_solver_pp_2m": DPMSolverPP2M(eta=1.0),
    "adams_bashforth_2": AdamsBashforth(2),
    "adams_bashforth_4": AdamsBashforth(4),
    "edm": EDM(),
    "edm_churn": EDM(churn=3.0),
    "euler_maruyama": EulerMaruyama(),
}
every_solver = pytest.mark.parametrize("solver", list(SOLVERS.values()), ids=list(SOLVERS))
STEP = [0.7, 0.4]


def start(path, t, count=20):
    data, _ = MIXTURE.sample(count, Key(0))
    noise = torch.randn(data.shape, dtype=data.dtype, generator=torch.Generator().manual_seed(0))
    return path.noised(data, noise, t)


def one_step(solver, path, kind="noise", times=STEP):
    x = start(path, times[0])
    return x, sample(MIXTURE.field(path, kind), x, times, solver=solver)


@pytest.mark.parametrize(
    "path", [Straight(), Cosine(), VariancePreserving(), VarianceExploding(5.0)], ids=repr
)
def test_three_forms_of_ddim_are_one(path):
    p, q = (path.coefficients(t) for t in STEP)
    x, found = one_step(DDIM(), path)
    data, noise = (MIXTURE.predict(kind, x, STEP[0], path) for kind in ("data", "noise"))
    h = path.half_log_snr(STEP[1]) - path.half_log_snr(STEP[0])
    forms = (
        q.alpha * data + q.sigma * noise,
        q.sigma / p.sigma * x - q.alpha * torch.expm1(-h) * data,
        q.alpha / p.alpha * x + q.alpha * (q.sigma / q.alpha - p.sigma / p.alpha) * noise,
    )
    for form in forms:
        torch.testing.assert_close(found, form, rtol=1e-13, atol=1e-13)


def test_ddim_is_euler_on_the_straight_path_and_in_sigma_and_not_on_the_cosine():
    difference = {}
    for path in (Straight(), VarianceExploding(5.0), Cosine()):
        difference[path] = (one_step(DDIM(), path)[1] - one_step(Euler(), path)[1]).abs().max()
    assert difference[Straight()] < 1e-14
    assert difference[VarianceExploding(5.0)] < 1e-13
    assert difference[Cosine()] > 0.01


@pytest.mark.parametrize("kind", ["data", "noise", "velocity", "v", "score"])
@every_solver
def test_what_the_network_predicts_does_not_matter(solver, kind):
    path, key = Cosine(), Key(3)
    times = time_grid(path, 4, first=0.9, last=0.1)
    x = start(path, 0.9)
    found = sample(MIXTURE.field(path, kind), x, times, solver=solver, key=key)
    expected = sample(MIXTURE.field(path, "noise"), x, times, solver=solver, key=key)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP2M(), DPMSolver2(), AdamsBashforth(3)], ids=repr)
@pytest.mark.parametrize("path", [Straight(), VariancePreserving(), VarianceExploding(5.0)], ids=repr)
def test_a_single_point_of_data_is_exact_in_one_step_of_any_length(solver, path):
    point = GaussianMixture.isotropic([[1.0, -2.0]], 0.0)
    noise = torch.randn(6, 2, dtype=torch.float64)
    x = path.noised(point.means, noise, 0.95)
    for times in ([0.95, 0.2], [0.95, 0.7, 0.3, 0.2]):
        found = sample(point.field(path, "data"), x, times, solver=solver)
        torch.testing.assert_close(found, path.noised(point.means, noise, 0.2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sample(point.field(path, "data"), x, [0.95, 0.0], solver=solver), point.means.expand(6, 2)
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", [Straight(), VariancePreserving(), VarianceExploding(5.0)], ids=repr)
def test_ddim_eta_on_a_single_point_has_the_exact_law_on_any_grid(path, eta):
    """x_q ~ N(alpha_q x0, sigma_q^2 I) for every eta."""
    point, count = GaussianMixture.isotropic([[1.0, -2.0]], 0.0), 20_000
    x = path.noised(point.means, torch.randn(count, 2, dtype=torch.float64), 0.9)
    found = sample(point.field(path, "data"), x, [0.9, 0.85, 0.4, 0.3], solver=DDIM(eta), key=Key(1))
    end = path.coefficients(0.3)
    away = (found - end.alpha * point.means) / end.sigma
    assert (away.mean(0).abs() < 5 / count**0.5).all()
    assert ((away.T.cov() - torch.eye(2)).abs() < 5 * (2 / count) ** 0.5).all()


def test_second_order_with_the_same_data_twice_is_ddim():
    path, times = VariancePreserving(), [0.9, 0.6, 0.3]
    constant = Field(lambda x, t: torch.full_like(x, 0.7), path, "data")
    x = torch.randn(4, 2, dtype=torch.float64)
    found = sample(constant, x, times, solver=DPMSolverPP2M())
    torch.testing.assert_close(found, sample(constant, x, times, solver=DDIM()), rtol=1e-14, atol=1e-14)


def test_adams_bashforth_of_order_one_is_ddim():
    path = VariancePreserving()
    expected, found = (one_step(solver, path)[1] for solver in (DDIM(), AdamsBashforth(1)))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_adams_bashforth_starts_from_pure_noise_by_a_step_of_ddim():
    field, solver = MIXTURE.field(Cosine(), "v"), AdamsBashforth(3)
    x = torch.randn(4, 2, dtype=torch.float64)
    after = sample(field, x, [1.0, 0.8], solver=DDIM())
    expected = sample(field, after, [0.8, 0.5, 0.2, 0.1], solver=solver)
    found = sample(field, x, [1.0, 0.8, 0.5, 0.2, 0.1], solver=solver)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_edm_without_churn_is_heun_in_sigma():
    path = VariancePreserving()
    x, found = one_step(EDM(), path)
    p, q = (float(c.sigma / c.alpha) for c in map(path.coefficients, STEP))
    ends = VarianceExploding(20.0)
    field = MIXTURE.field(path, "noise").on(ends)
    scaled = sample(field, x / path.coefficients(STEP[0]).alpha, [p / 20, q / 20], solver=Heun())
    torch.testing.assert_close(found, scaled * path.coefficients(STEP[1]).alpha, rtol=1e-11, atol=1e-11)


def test_lagrange_integrals_integrate_polynomials_exactly():
    nodes = [0.3, 0.7, 1.5, 2.0]
    for power in range(4):
        found = sum(w * n**power for w, n in zip(lagrange_integrals(nodes, 0.3, -0.2), nodes))
        exact = ((-0.2) ** (power + 1) - 0.3 ** (power + 1)) / (power + 1)
        assert found == pytest.approx(exact, rel=1e-12)


ORDERS = {
    "euler": 1, "ddim": 1, "heun": 2, "edm": 2, "dpm_solver_2": 2, "dpm_solver_pp_2m": 2,
    "adams_bashforth_2": 2, "rk4": 4,
}  # fmt: skip


@pytest.mark.parametrize(("name", "order"), ORDERS.items(), ids=list(ORDERS))
@pytest.mark.parametrize(
    ("path", "spacing"), [(Cosine(), "half_log_snr"), (Straight(), "time")], ids=["cosine", "straight"]
)
def test_solvers_converge_at_their_order(name, order, path, spacing):
    gaussian = GaussianMixture.drawn(1, 2, seed=2)
    x = torch.randn(30, 2, dtype=torch.float64)
    exact = gaussian.flow(x, 0.98, 0.05, path)

    def error(steps):
        grid = time_grid(path, steps, spacing, first=0.98, last=0.05)
        found = sample(gaussian.field(path, "velocity"), x, grid, solver=SOLVERS[name])
        return float((found - exact).square().mean().sqrt())

    coarse, fine = (20, 40) if order == 4 else (80, 160)
    measured = math.log2(error(coarse) / error(fine))
    assert abs(measured - order) < (0.5 if order == 4 else 0.25), measured


def test_the_dry_run_of_the_grid_matters_for_exploding_paths():
    """2M on uniform sigma is far worse than on uniform log sigma, at equal steps."""
    path = VarianceExploding(20.0)
    x = start(path, 1.0, 200)
    field = MIXTURE.field(path, "data")
    exact = sample(field, x, time_grid(path, 1500, "half_log_snr", last=0.0025), solver=RungeKutta4())

    def error(spacing):
        grid = time_grid(path, 80, spacing, last=0.0025)
        return float((sample(field, x, grid, solver=DPMSolverPP2M()) - exact).square().mean().sqrt())

    assert error("time") > 20 * error("half_log_snr")


@pytest.mark.parametrize(
    "name", ["ancestral", "sde_dpm_solver_pp_2m", "edm_churn", "euler_maruyama", "ddim_eta"]
)
def test_stochastic_solvers_keep_the_law_of_gaussian_data(name):
    """Mean and covariance at the end against the exact marginal, within noise and the bias of the step."""
    gaussian, path, count = GaussianMixture.drawn(1, 2, seed=2), Cosine(), 10_000
    noise = torch.randn(count, 2, dtype=torch.float64)
    data, _ = gaussian.sample(count, Key(0))
    grid = time_grid(path, 150, "half_log_snr", first=0.98, last=0.05)
    solver = EDM(churn=30.0) if name == "edm_churn" else SOLVERS[name]
    found = sample(gaussian.field(path), path.noised(data, noise, 0.98), grid, solver=solver, key=Key(4))
    end = path.coefficients(0.05)
    mean = end.alpha * gaussian.means[0]
    covariance = end.alpha**2 * gaussian.covariances[0] + end.sigma**2 * torch.eye(2)
    spread = covariance.diagonal().sqrt()
    assert ((found.mean(0) - mean).abs() < 5 * spread / count**0.5 + 0.02 * spread).all()
    noise_of_cov = (torch.outer(spread, spread) ** 2 + covariance**2).sqrt() / count**0.5
    assert ((found.T.cov() - covariance).abs() < 5 * noise_of_cov + 0.03 * torch.outer(spread, spread)).all()


@every_solver
def test_the_last_step_may_go_to_data_and_a_single_step_will_do(solver):
    path = Cosine()
    field = MIXTURE.field(path, "v")
    if isinstance(solver, RungeKutta4 | EulerMaruyama | EDM | AdamsBashforth):
        grids = [[0.9, 0.5, 0.0], [0.9, 0.0]]
    else:
        grids = [[1.0, 0.5, 0.0], [1.0, 0.0]]
    for grid in grids:
        if isinstance(solver, EDM) and solver.churn:
            solver = EDM(churn=0.2)
        found = sample(field, torch.randn(5, 2), grid, solver=solver, key=Key(0))
        assert torch.isfinite(found).all()


def test_the_step_to_data_draws_no_noise():
    x = torch.randn(3, 2)
    field = MIXTURE.field(Cosine(), "data")
    for solver in (DDIM(1.0), DPMSolverPP2M(1.0)):
        found = [sample(field, x, [0.9, 0.0], solver=solver, key=Key(seed)) for seed in (1, 2)]
        assert torch.equal(*found)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP2M(), AdamsBashforth(2)], ids=repr)
def test_the_way_to_noise_undoes_the_way_to_data(solver):
    path = VariancePreserving()
    x = start(path, 0.8)
    grid = time_grid(path, 200, first=0.8, last=0.05)
    field = MIXTURE.field(path, "noise")
    there = sample(field, x, grid, solver=solver)
    back = sample(field, there, grid.flip(0), solver=solver)
    assert (back - x).abs().max() < 0.1
    assert (back - x).abs().max() < 0.1 * (there - x).abs().max()


def test_resampling_on_another_path_at_matched_ratios_is_rescaling():
    """DDIM with the field moved to path B, at the same ratios, is DDIM on A times a factor."""
    a, b = VariancePreserving(), Straight()
    grid = time_grid(a, 12, first=0.95, last=0.05)
    matched = b.time_at(a.half_log_snr(grid))
    field = MIXTURE.field(a, "noise")
    x = start(a, 0.95)
    first, last = (b.coefficients(matched[i]).alpha / a.coefficients(grid[i]).alpha for i in (0, -1))
    found = sample(field.on(b), first * x, matched, solver=DDIM())
    torch.testing.assert_close(found, last * sample(field, x, grid, solver=DDIM()), rtol=1e-10, atol=1e-10)


def test_trajectories_hold_the_states_at_all_times():
    field = MIXTURE.field(Straight())
    grid = time_grid(Straight(), 4, last=0.1)
    x = torch.randn(3, 2)
    states = sample(field, x, grid, solver=DPMSolverPP2M(), trajectory=True)
    assert len(states) == 5
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], sample(field, x, grid, solver=DPMSolverPP2M()))
    assert torch.equal(states[2], sample(field, x, grid[:3], solver=DPMSolverPP2M()))
    total = sample(field, x, grid, solver=DPMSolverPP2M(), trajectory=True, then=lambda s: sum(s).sum())
    torch.testing.assert_close(total, sum(states).sum())


class Small(nn.Module):
    """A network with dropout-free nonlinear dependence on state, time, parameters and a condition."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x, t, c):
        return self.inner(torch.cat([x, t[:, None], c.expand(len(x), 1)], 1))


def gradients(solver, policy, kind="noise", steps=5):
    torch.manual_seed(1)
    net = Small()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    path = Cosine()
    loss = sample(
        Field(net, path, kind),
        x,
        time_grid(path, steps, first=0.9, last=0.1),
        solver=solver,
        gradient=policy,
        conditions={"c": c},
        then=lambda x: (x**3).sum(),
        key=Key(5),
    )
    return loss.detach(), torch.autograd.grad(loss, [x, c, *net.parameters()], allow_unused=True)


EXACT = {
    "checkpointed": Checkpointed(),
    "slots": Checkpointed(slots=2),
    "segments": Checkpointed(segments=2),
    "stride": Checkpointed(stride=2),
    "host": Checkpointed(slots=2, on="host"),
    "budget": Checkpointed(budget="1MB"),
    "truncated_to_all": Truncated(last=5),
    "route_of_ones": Route(state=1.0, parameters=1.0, store=Checkpointed(slots=3)),
}


@pytest.mark.parametrize("policy", list(EXACT.values()), ids=list(EXACT))
@every_solver
def test_every_exact_policy_agrees_with_backprop_through_every_sampler(solver, policy):
    expected_loss, expected = gradients(solver, Backprop())
    loss, found = gradients(solver, policy)
    assert loss == expected_loss
    for mine, exact in zip(found, expected):
        assert exact.abs().max() > 0
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@every_solver
def test_backprop_is_the_derivative_of_the_sampler(solver):
    """Against finite differences of the whole sampler, noise fixed by its key."""
    path, grid = Cosine(), [0.9, 0.6, 0.3]
    field = MIXTURE.field(path, "velocity")
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: sample(field, x, grid, solver=solver, key=Key(2)), x, eps=1e-6, atol=1e-5
    )


@every_solver
def test_biased_policies_differ_and_run(solver):
    _, exact = gradients(solver, Backprop())
    for policy in (Truncated(last=2), Skipped(), Route(state=Last(2), store=Checkpointed())):
        loss, found = gradients(solver, policy)
        assert torch.isfinite(loss)
        reached = [mine is not None and bool((mine != true).any()) for mine, true in zip(found, exact)]
        # truncation cuts the initial state off, skipping the network; what is left differs
        assert reached == [policy != Truncated(last=2)] + [policy != Skipped()] * (len(exact) - 1)


def test_truncation_counts_steps_of_the_solver():
    """One step of Heun is one step, with both its calls."""
    calls = []
    net = nn.Linear(2, 2)
    field = Field(lambda x, t: (calls.append(torch.is_grad_enabled()), net(x))[1], Straight())
    sample(
        field,
        torch.randn(2, 2),
        time_grid(Straight(), 4, last=0.2),
        solver=Heun(),
        gradient=Truncated(last=1),
    )
    assert calls == [False] * 6 + [True] * 2


def test_noise_comes_from_the_key_alone_and_from_torch_without_one():
    field, x = MIXTURE.field(Straight()), torch.randn(4, 2)

    def run(key=None):
        return sample(field, x, [0.9, 0.5, 0.2], solver=DDIM(1.0), key=key)

    assert torch.equal(run(Key(1)), run(Key(1)))
    assert not torch.equal(run(Key(1)), run(Key(2)))
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


def test_half_precision_sums_in_float32():
    field = MIXTURE.field(VariancePreserving(), "noise")
    x = torch.randn(50, 2)
    grid = time_grid(field.path, 20, first=0.9, last=0.2)
    coarse = sample(field, x.bfloat16(), grid, solver=DPMSolverPP2M())
    assert coarse.dtype == torch.bfloat16
    assert (coarse.float() - sample(field, x, grid, solver=DPMSolverPP2M())).abs().mean() < 0.05


def test_a_solver_of_your_own_needs_two_names():
    @dataclass
    class Midpoint:
        memory: int = 0

        def advance(self, step):
            half = type(step.start).of(step.path, (step.start.time + step.end.time) / 2)
            first = step.predict(step.x, step.start).of("velocity")
            ahead = step.x + (half.time - step.start.time) * first
            return step.x + (step.end.time - step.start.time) * step.predict(ahead, half).of("velocity")

    x = torch.randn(4, 2, dtype=torch.float64)
    exact = MIXTURE.flow(x, 0.9, 0.2, Straight())
    grids = [time_grid(Straight(), n, first=0.9, last=0.2) for n in (40, 80)]
    found = [sample(MIXTURE.field(Straight()), x, grid, solver=Midpoint()) for grid in grids]
    errors = [float((value - exact).norm()) for value in found]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.3


def test_sampling_compiles_and_maps():
    field = Field(lambda x, t: torch.sin(x), Cosine(), "noise")
    grid = [0.9, 0.5, 0.1]
    x = torch.randn(3, 2)
    expected = sample(field, x, grid, solver=DPMSolverPP2M())
    compiled = torch.compile(lambda x: sample(field, x, grid, solver=DPMSolverPP2M()), backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    mapped = torch.func.vmap(lambda x: sample(field, x[None], grid, solver=DPMSolverPP2M())[0])
    torch.testing.assert_close(mapped(x), expected)
    jacobian = torch.func.jacrev(lambda x: sample(field, x, grid))(x)
    assert jacobian.shape == (3, 2, 3, 2)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"times": [0.5]}, "times"),
        ({"times": [0.5, 0.7, 0.6]}, "times"),
        ({"times": [0.5, 0.5]}, "times"),
        ({"times": [1.2, 0.5]}, "times"),
        ({"times": [float("nan"), 0.5]}, "times"),
        ({"times": [0.2, 0.8], "solver": DDIM(1.0)}, "times"),
        ({"times": [1.0, 0.5], "solver": EDM()}, "times"),
        ({"times": [1.0, 0.5], "solver": EulerMaruyama()}, "times"),
        ({"times": [1.0, 0.5], "field": MIXTURE.field(Straight(), "noise")}, "times"),
        ({"times": [0.5, 0.0], "solver": RungeKutta4(), "field": MIXTURE.field(Straight(), "data")}, "times"),
        ({"times": [0.99, 0.5], "solver": EDM(churn=1.0), "field": MIXTURE.field(VarianceExploding(), "data")}, "churn"),  # noqa: E501
        ({"times": [0.0, 0.5], "solver": DPMSolverPP2M()}, "times"),
        ({"times": [0.5, 1.0], "solver": DPMSolverPP2M()}, "times"),
        ({"times": [0.9, 0.5], "solver": DDIM(2.0)}, "eta"),
        ({"start": torch.tensor(1.0)}, "start"),
    ],
    ids=[
        "one", "turning", "equal", "late", "nan", "rising_noise", "edm", "maruyama", "noise_at_1",
        "data_at_0", "from_data", "to_noise", "churn", "eta", "scalar",
    ],
)  # fmt: skip
def test_bad_calls_are_refused_before_anything_runs(change, argument):
    given = {"field": MIXTURE.field(Straight()), "start": torch.zeros(2, 2), "times": [0.9, 0.1], **change}
    with pytest.raises(ArgumentError) as refusal:
        sample(given.pop("field"), given.pop("start"), given.pop("times"), **given)
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    field = MIXTURE.field(Straight())
    with pytest.raises(ArgumentTypeError, match=r"DDIM\(\)"):
        sample(field, torch.zeros(2, 2), [0.9, 0.1], solver=DDIM)
    with pytest.raises(ArgumentTypeError, match="solver"):
        sample(field, torch.zeros(2, 2), [0.9, 0.1], solver="ddim")
    with pytest.raises(ArgumentTypeError, match="field"):
        sample(lambda x, t: x, torch.zeros(2, 2), [0.9, 0.1])
    with pytest.raises(ArgumentTypeError, match="times"):
        sample(field, torch.zeros(2, 2), "now")
    for make in (lambda: DDIM(-1.0), lambda: AdamsBashforth(5), lambda: EDM(least=2.0, most=1.0)):
        with pytest.raises(ArgumentError):
            make()


@pytest.mark.parametrize("spacing", ["time", "half_log_snr", "karras"])
def test_grids_fall_between_their_ends(spacing):
    for path, steps in itertools.product((Straight(), VariancePreserving(), VarianceExploding()), (1, 2, 9)):
        grid = time_grid(path, steps, spacing, first=0.9, last=0.01)
        assert len(grid) == steps + 1
        assert (grid.diff() < 0).all()
        assert (float(grid[0]), float(grid[-1])) == (0.9, 0.01)
        ended = time_grid(path, steps, spacing, first=0.9, last=0.01, to_data=True)
        assert len(ended) == steps + 1
        assert ended[-1] == 0
    with pytest.raises(ArgumentError):
        time_grid(Straight(), 3, "even")
    with pytest.raises(ArgumentError):
        time_grid(Straight(), 3, last=1.0)


def test_ends_without_data_or_noise_have_no_even_ratios():
    for spacing in ("half_log_snr", "karras"):
        with pytest.raises(ArgumentError, match="first"):
            time_grid(Straight(), 3, spacing)
    assert time_grid(VarianceExploding(), 3, "karras", last=0.0)[-1] == 0


def test_the_grid_of_karras_is_the_formula_of_the_paper():
    grid = 80 * time_grid(VarianceExploding(80.0), 17, "karras", last=0.002 / 80)
    ramp = torch.linspace(0, 1, 18, dtype=torch.float64)
    exact = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(grid, exact, rtol=1e-10, atol=0)
