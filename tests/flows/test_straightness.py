"""What rectification promises, on pairs whose velocity is known in closed form, and what it does not."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    Cosine,
    Euler,
    Field,
    Heun,
    Independent,
    Paired,
    RungeKutta4,
    Straight,
    Trajectory,
    crossing,
    energy_distance,
    excess_transport_cost,
    follow,
    rectification_report,
    rectified_loss,
    sample,
    transport_cost,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture, MixturePair

# the authors' toy: two modes on the left flow to two on the right
TOY = MixturePair(
    data=GaussianMixture.isotropic([[15.0, 7.5], [15.0, -7.5]], 0.5),
    source=GaussianMixture.isotropic([[0.0, 7.5], [0.0, -7.5]], 0.5),
)
FINE = torch.linspace(1, 0, 401, dtype=torch.float64)


class Flowed(NamedTuple):
    data: Tensor
    source: Tensor
    path: Trajectory
    crossed: Tensor


def stratified(count, seed=0):
    """Independent pairs in blocks of 8: each noise and its mirror image with each pair of components."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count // 8, 1, 4, dtype=torch.float64, generator=generator) * 0.5
    noise = torch.cat([base.expand(-1, 4, -1), -base.expand(-1, 4, -1)], 1).reshape(count, 4)
    signs = torch.tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]], dtype=torch.float64).repeat(count // 4, 1)
    source = torch.stack([torch.zeros(count), 7.5 * signs[:, 0]], 1) + noise[:, :2]
    data = torch.stack([torch.full((count,), 15.0), 7.5 * signs[:, 1]], 1) + noise[:, 2:]
    return data, source


def flowed(count, times=FINE, path=None):
    path = Straight() if path is None else path
    data, source = stratified(count)
    field = TOY.field(path)
    return Flowed(
        data,
        source,
        follow(field, source, times, solver=RungeKutta4()),
        crossing(field, data, source, times),
    )


@pytest.fixture(scope="module")
def toy():
    return flowed(800)


def balance(found):
    drop = transport_cost(found.data, found.source) - transport_cost(found.path.data, found.source)
    return drop, found.path.straightness() + found.crossed


def test_eq_15_the_drop_of_the_cost_is_straightness_plus_crossing(toy):
    drop, parts = balance(toy)
    # blocks are independent of each other, their rows are not
    difference = (drop - parts).reshape(-1, 8).mean(1)
    tolerance = 5 * float(difference.std()) / len(difference) ** 0.5
    assert abs(float(difference.mean())) < tolerance < 0.15 * float(drop.mean())


@pytest.mark.slow
def test_eq_15_within_1_percent_on_16k_stratified_pairs():
    """The dry run: 338.46 - 225.00 = 113.46 against 99.36 + 13.83 = 113.19."""
    found = flowed(16384)
    drop, parts = balance(found)
    assert abs(float(drop.mean() - parts.mean())) < 0.01 * float(drop.mean())
    assert float(transport_cost(found.data, found.source).mean()) == pytest.approx(338.46, rel=0.01)
    assert float(transport_cost(found.path.data, found.source).mean()) == pytest.approx(225.0, rel=0.01)
    assert float(found.path.straightness().mean()) == pytest.approx(99.36, rel=0.02)
    assert float(found.crossed.mean()) == pytest.approx(13.83, rel=0.03)


def test_eq_15_does_not_hold_on_a_path_that_is_not_straight():
    """The cosine path keeps the laws but not the balance, on which the theorem of costs rests."""
    drop, parts = balance(flowed(400, path=Cosine()))
    assert abs(float(drop.mean() - parts.mean())) > 0.2 * float(drop.mean())


@pytest.mark.parametrize("cost", ["length", "square", "fourth", "one_sided"])
def test_theorem_3_5_every_convex_cost_falls(toy, cost):
    """Including one that is convex and not symmetric."""
    chosen = (lambda z: torch.relu(z[:, 1]) + z[:, 0].exp() * 1e-6) if cost == "one_sided" else cost
    before = transport_cost(toy.data, toy.source, chosen)
    after = transport_cost(toy.path.data, toy.source, chosen)
    change = after - before
    assert float(change.mean()) < -5 * float(change.std()) / len(change) ** 0.5


def test_theorem_3_5_says_nothing_of_costs_that_are_not_convex():
    """N(0, 1) to N(3, 1): everything moves by 3, which costs more in root lengths than moving at random."""
    data, source, _ = gaussians(3.0, 1.0).draw(2000, Key(0))
    end = sample(gaussians(3.0, 1.0).field(Straight()), source, FINE[::8], solver=RungeKutta4())

    def root(z):
        return z[:, 0].abs().sqrt()

    before, after = transport_cost(data, source, root), transport_cost(end, source, root)
    torch.testing.assert_close(after, torch.full_like(after, math.sqrt(3)), rtol=1e-6, atol=0.0)
    assert float(before.mean()) + 5 * float(before.std()) / 2000**0.5 < float(after.mean())


@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
@pytest.mark.parametrize("t", [0.75, 0.5, 0.25, 0.0])
def test_theorem_3_3_the_law_of_the_flow_is_that_of_the_lines(t, path):
    """Moments at t = .25, .5, .75 against the closed form, on two mixtures without symmetry."""
    pair = MixturePair(GaussianMixture.drawn(3, 2, seed=1), GaussianMixture.drawn(2, 2, seed=2))
    count = 3000
    source, _ = pair.source.sample(count, Key(1))
    times = torch.linspace(1, t, 41, dtype=torch.float64)
    states = sample(pair.field(path), source, times, solver=RungeKutta4())
    law = pair.law(t, path)
    mean = law.weights @ law.means
    second = torch.einsum(
        "k,kij->ij", law.weights, law.covariances + law.means[:, :, None] * law.means[:, None]
    )
    assert bool(((states.mean(0) - mean).abs() < 5 * states.std(0) / count**0.5).all())
    products = states[:, :, None] * states[:, None]
    assert bool(((products.mean(0) - second).abs() < 5 * products.std(0) / count**0.5).all())


def test_one_euler_step_averages_the_modes_and_many_do_not(toy):
    """Mean |y| of the data is 7.5; one step from the source ends between the modes."""
    ends = toy.path.data[:, 1].abs()
    # every point keeps to the side it starts on, so that the noise of the source is all that scatters
    assert abs(float(ends.mean()) - 7.5) < 0.02
    single = sample(TOY.field(Straight()), toy.source, [1.0, 0.0], solver=Euler())[:, 1]
    # antithetic noise leaves the mean of |y| of a normal of deviation 0.5 at most
    assert float(single.abs().mean()) < 0.5
    assert float(energy_distance(single[:, None], toy.data[:, 1:])) > 1


def gaussians(m=3.0, s=2.0):
    return MixturePair(GaussianMixture.isotropic([[m]], s), GaussianMixture.isotropic([[0.0]], 1.0))


def test_gaussians_in_one_dimension_have_the_closed_form_flow():
    """Paper's time: Z_t = t m + sqrt((1 - t)^2 + t^2 s^2) Z_0, and Z_1 = m + s Z_0, which is optimal."""
    m, s = 3.0, 2.0
    source = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found = follow(gaussians(m, s).field(Straight()), source, FINE, solver=RungeKutta4())
    paper = 1 - FINE
    exact = paper[:, None, None] * m + ((1 - paper) ** 2 + paper**2 * s**2).sqrt()[:, None, None] * source
    torch.testing.assert_close(found.states, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.data, m + s * source, rtol=1e-9, atol=1e-9)
    # monotone, hence optimal: no pairing of the same points is cheaper
    assert abs(float(excess_transport_cost(found.data, source))) < 1e-12


def test_gaussians_in_one_dimension_straightness_is_the_integral_and_zero_after_reflow():
    """S = int (d/dt sqrt(c_t))^2 dt - (s - 1)^2 > 0 for the first flow, exactly 0 for the second."""
    m, s = 3.0, 2.0
    paper = torch.linspace(0, 1, 20001, dtype=torch.float64)
    c = (1 - paper) ** 2 + paper**2 * s**2
    rate = (paper * s**2 - (1 - paper)) / c.sqrt()
    expected = float(torch.trapezoid(rate**2, paper)) - (s - 1) ** 2
    unit = torch.ones(1, 1, dtype=torch.float64)
    first = follow(gaussians(m, s).field(Straight()), unit, FINE, solver=RungeKutta4())
    assert expected > 0.1
    # the trapezoid rule on 400 intervals
    assert float(first.straightness()) == pytest.approx(expected, rel=1e-4)

    second = line_field(lambda x: m + s * x, m, s)
    source = torch.randn(50, 1, dtype=torch.float64)
    found = follow(second, source, FINE, solver=Euler())
    assert float(found.straightness().max()) < 1e-24 * 400
    once = sample(second, source, [1.0, 0.0], solver=Euler())
    torch.testing.assert_close(once, m + s * source, rtol=1e-14, atol=1e-14)
    assert float(crossing(second, m + s * source, source, FINE).max()) < 1e-24
    # the first flow in one step is far from it
    single = sample(gaussians(m, s).field(Straight()), source, [1.0, 0.0], solver=Euler())
    assert float((single - once).abs().max()) > 0.5


def test_theorem_3_7_the_sum_over_reflows_is_at_most_the_first_cost():
    """S(Z^1) + V(independent) is the whole drop; after it nothing is left for S(Z^2) + V(Z^1)."""
    m, s = 3.0, 2.0
    pair = gaussians(m, s)
    data, source, _ = pair.draw(4000, Key(0))
    field = pair.field(Straight())
    times = FINE[::4]
    first = follow(field, source, times, solver=RungeKutta4())
    one = first.straightness() + crossing(field, data, source, times)
    second = line_field(lambda x: m + s * x, m, s)
    again = follow(second, source, times, solver=Euler())
    two = again.straightness() + crossing(second, first.data, source, times)
    assert float(two.mean()) < 1e-9
    total = transport_cost(data, source)
    assert float((one + two).mean()) < float(total.mean())
    # E|X1 - X0|^2 = m^2 + s^2 + 1 and E|Z1 - Z0|^2 = m^2 + (s - 1)^2
    assert abs(float(one.mean()) - 2 * s) < 5 * float(one.std()) / 4000**0.5


def line_field(end, m, s):
    """The exact velocity of the pairs (m + s x, x): lines that do not cross."""

    def velocity(x, t):
        at = t[:, None].to(x)
        # x_t = (1 - t) (m + s z) + t z
        start = (x - (1 - at) * m) / ((1 - at) * s + at)
        return start - end(start)

    return Field(velocity, Straight(), "velocity", coupled=True)


@pytest.mark.parametrize(("shift", "scale"), [(3.0, 1.0), (0.0, 2.5), (-1.0, 0.5)])
def test_a_coupling_without_crossings_is_a_fixed_point(shift, scale):
    """V = 0, v exact, one Euler step equals N steps up to rounding."""
    source = torch.randn(30, 2, dtype=torch.float64)
    data = shift + scale * source
    field = line_field(lambda z: shift + scale * z, shift, scale)
    assert float(crossing(field, data, source, FINE[::40]).max()) < 1e-24
    assert float(rectified_loss(field, data, source).max()) < 1e-24
    once = sample(field, source, [1.0, 0.0], solver=Euler())
    many = sample(field, source, torch.linspace(1, 0, 65), solver=Euler())
    torch.testing.assert_close(once, data, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(many, once, rtol=1e-12, atol=1e-12)


def test_a_constant_field_is_undone_exactly():
    field = Field(lambda x, t: torch.full_like(x, 0.75), Straight(), coupled=True)
    # multiples of a power of two: not even rounding is left
    start = (torch.randn(20, 2, dtype=torch.float64) * 64).round() / 64
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    there = sample(field, start, times, solver=Euler())
    assert torch.equal(there, start - 0.75)
    assert torch.equal(sample(field, there, times.flip(0), solver=Euler()), start)


@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (Heun(), 2), (RungeKutta4(), 4)], ids=["euler", "heun", "rk4"]
)
def test_a_smooth_field_is_undone_at_the_solvers_order(solver, order):
    pair = MixturePair(GaussianMixture.drawn(2, 2, seed=1), GaussianMixture.drawn(1, 2, seed=2))
    field = pair.field(Straight())
    start, _ = pair.source.sample(30, Key(0))

    def error(steps):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = sample(field, start, times, solver=solver)
        back = sample(field, end, times.flip(0), solver=solver)
        exact = sample(field, start, FINE, solver=RungeKutta4())
        return float((end - exact).norm()), float((back - start).norm())

    coarse, fine = error(40), error(80)
    rates = [math.log2(a / b) for a, b in zip(coarse, fine)]
    assert abs(rates[0] - order) < 0.35
    # a method and its mirror may share their leading error, which then cancels: at least the order
    assert rates[1] > order - 0.35


def test_straight_does_not_imply_optimal_in_two_dimensions():
    """Rotated normals: the lines do not cross, so the flow is straight, and staying put is cheaper."""
    angle = math.pi / 3
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    unit = torch.eye(2, dtype=torch.float64)

    def velocity(x, t):
        mix = (1 - t)[:, None, None] * turn + t[:, None, None] * unit
        start = torch.linalg.solve(mix, x[:, :, None])
        return (start - turn @ start)[:, :, 0]

    field = Field(velocity, Straight(), "velocity", coupled=True)
    source = torch.randn(400, 2, dtype=torch.float64)
    found = follow(field, source, FINE[::20], solver=Euler())
    assert float(found.straightness().max()) < 1e-20
    torch.testing.assert_close(found.data, source @ turn.T, rtol=1e-10, atol=1e-10)
    assert float(excess_transport_cost(found.data, source)) > 0.3 * float(
        transport_cost(found.data, source).mean()
    )


def test_the_last_time_looked_at_is_one_step_before_the_data():
    """Euler steps i / N in the paper's time: i = 0 to N - 1, never 1."""
    seen = []

    def network(x, t):
        seen.append(float(t[0]))
        return x

    field = Field(network, Straight(), direction="data_at_1")
    sample(field, torch.zeros(1, 1), torch.linspace(1, 0, 5), solver=Euler())
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_extrapolated_data_stay_put_along_straight_flows_alone(toy):
    field = line_field(lambda x: 3 + 2 * x, 3.0, 2.0)
    source = torch.randn(10, 1, dtype=torch.float64)
    straight = follow(field, source, FINE[::40], solver=Euler())
    ends = straight.extrapolated(field)
    torch.testing.assert_close(ends, (3 + 2 * source).expand_as(ends), rtol=1e-12, atol=1e-12)
    bent = toy.path.extrapolated(TOY.field(Straight()))
    assert float((bent[0] - bent[-1]).abs().max()) > 5
    torch.testing.assert_close(bent[-1], toy.path.data)


def test_few_euler_steps_on_a_steep_field_are_worse_than_fewer():
    """The pitfall of simulating pairs: near the middle the field is so steep that 32 steps lose to 8."""
    _, source = stratified(400)
    exact = sample(TOY.field(Straight()), source, FINE, solver=RungeKutta4())

    def error(steps):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        found = sample(TOY.field(Straight()), source, times, solver=Euler())
        return float((found - exact).square().sum(1).mean().sqrt())

    few, more, many = error(8), error(32), error(128)
    assert more > few > many


def test_costs_are_their_formulas():
    data, source = torch.randn(2, 5, 2, 3)
    z = (data - source).double().reshape(5, 6)
    torch.testing.assert_close(transport_cost(data, source, "length"), z.norm(dim=1))
    torch.testing.assert_close(transport_cost(data, source), (z**2).sum(1))
    torch.testing.assert_close(transport_cost(data, source, "fourth"), (z**4).sum(1))


def test_energy_distance_is_the_double_sum_and_knows_equal_laws():
    a, b = torch.randn(7, 3), torch.randn(5, 3) + 1

    def mean(x, y):
        return sum((p - q).double().norm() for p in x for q in y) / (len(x) * len(y))

    expected = 2 * mean(a, b) - mean(a, a) - mean(b, b)
    torch.testing.assert_close(energy_distance(a, b, chunk=2), expected, rtol=1e-6, atol=1e-7)
    assert float(energy_distance(a, a)) == 0
    first, second = torch.randn(2, 1500, 2)
    floor = float(torch.cdist(first[:500], second[:500]).mean()) * 2 / 1500
    assert 0 < float(energy_distance(first, second)) < 3 * floor
    assert float(energy_distance(first, second + 0.5)) > 20 * floor


def test_the_report_says_what_its_parts_say():
    times = FINE[::5]
    report = rectification_report(
        TOY.field(Straight()), TOY, times, count=400, solver=RungeKutta4(), steps=(1, 4), key=Key(1)
    )
    data, source, _ = TOY.draw(400, Key(1))
    path = follow(TOY.field(Straight()), source, times, solver=RungeKutta4())
    assert report.straightness == float(path.straightness().mean())
    assert report.crossing == float(crossing(TOY.field(Straight()), data, source, times).mean())
    drop = report.costs_before["square"] - report.costs_after["square"]
    assert report.balance == pytest.approx(drop - report.straightness - report.crossing, rel=1e-9)
    assert abs(report.balance) < 5 * report.balance_error < drop
    assert list(report.marginals) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    # both sets of points share their source, and the floor is that of halves
    assert max(report.marginals.values()) < 10 * report.floor
    assert [row.steps for row in report.few_steps] == [1, 4]
    assert report.few_steps[0].error > 5
    assert report.few_steps[0].distance > 1
    assert report.excess < 0.01 * report.costs_after["square"]
    assert "straightness S" in str(report)
    assert "Euler steps" in str(report)


def test_the_report_of_given_pairs_hands_their_conditions_on():
    labels = torch.arange(20.0)
    pairs = Paired(torch.zeros(20, 1), torch.ones(20, 1) * labels[:, None], {"label": labels})
    field = Field(lambda x, t, label: label[:, None].expand_as(x), Straight(), coupled=True)
    report = rectification_report(field, pairs, [1.0, 0.5, 0.0], count=20, steps=(1,))
    assert report.straightness == report.crossing == report.few_steps[0].error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_images_and_both_precisions(dtype):
    source = torch.randn(4, 2, 3, 3, dtype=dtype)
    field = Field(lambda x, t: -x, Straight(), coupled=True)
    found = follow(field, source, [1.0, 0.5, 0.0])
    assert found.states.dtype == dtype
    assert found.straightness().shape == (4,)
    assert crossing(field, source, source, [1.0, 0.0]).shape == (4,)
    scalars = follow(field, source[:, 0, 0, 0], [1.0, 0.5, 0.0]).straightness()
    assert scalars.shape == (4,)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: transport_cost(torch.zeros(3, 2), torch.zeros(3, 2), "cubic"), "cost"),
        (lambda: transport_cost(torch.zeros(3, 2), torch.zeros(3, 2), lambda z: z), "cost"),
        (lambda: transport_cost(torch.zeros(3, 2), torch.zeros(2, 2)), "source"),
        (lambda: energy_distance(torch.zeros(3, 2), torch.zeros(3, 1)), "b"),
        (lambda: energy_distance(torch.zeros(0, 2), torch.zeros(3, 2)), "a"),
        (lambda: rectification_report(TOY.field(Straight()), TOY, FINE, count=1), "count"),
        (lambda: rectification_report(TOY.field(Straight()), TOY, FINE, steps=(0,)), "steps"),
        (lambda: follow(TOY.field(Straight()), torch.zeros(3, 2).double(), [0.5]), "times"),
    ],
    ids=["name", "shape", "rows", "features", "empty", "count", "steps", "grid"],
)
def test_bad_calls_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_a_coupling_is_asked_for_by_name():
    with pytest.raises(ArgumentTypeError, match="coupling"):
        rectification_report(TOY.field(Straight()), Independent, FINE)
