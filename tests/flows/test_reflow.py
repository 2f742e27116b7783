"""Reflow and distillation: pairs that stay together, teachers that stay put, straighter flows."""

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from thalweg.flows import (
    DDIM,
    Euler,
    Field,
    Heun,
    Paired,
    Reflowed,
    RungeKutta4,
    Straight,
    distillation_loss,
    energy_distance,
    follow,
    nearest_pairs_field,
    probability_flow,
    pseudo_huber,
    rectified_loss,
    reflow,
    reflow_pairs,
    sample,
    transport_cost,
)
from thalweg.noise import Key, normal
from thalweg.problems import GaussianMixture, MixturePair

PAIR = MixturePair(GaussianMixture.drawn(3, 2, seed=1), GaussianMixture.isotropic([[0.0, 0.0]], 1.0))
EXACT = PAIR.field(Straight())
TIMES = torch.linspace(1, 0, 33, dtype=torch.float64)


def source(count, key):
    return normal(torch.empty(count, 2, dtype=torch.float64), key)


class Net(nn.Module):
    def __init__(self, width=64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)]
        self.inner = nn.Sequential(*layers, nn.Dropout(0.0)).double()

    def forward(self, x, t):
        return self.inner(torch.cat([x, t[:, None].to(x)], 1))


def fitted(field, pairs, steps=300, loss=rectified_loss):
    optimizer = torch.optim.Adam(field.network.parameters(), lr=3e-3)
    for step in range(steps):
        data, start, _ = pairs.draw(256, Key(5, step))
        optimizer.zero_grad()
        loss(field, data, start).mean().backward()
        optimizer.step()
    return field


@pytest.mark.parametrize(
    "solver", [None, Euler(), Heun(), RungeKutta4()], ids=["ddim", "euler", "heun", "rk4"]
)
def test_stored_and_streamed_pairs_are_the_samplers_ends(solver):
    start = source(50, Key(0))
    stored = reflow_pairs(EXACT, start, TIMES, solver=solver, batch=16)
    expected = sample(EXACT, start, TIMES, solver=solver)
    torch.testing.assert_close(stored.data, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(stored.source, start)
    streamed = Reflowed(EXACT, source, TIMES, solver)
    drawn = streamed.draw(50, Key(0))
    assert torch.equal(drawn.source, start)
    torch.testing.assert_close(drawn.data, expected, rtol=1e-12, atol=1e-12)
    assert not drawn.data.requires_grad


def test_any_solver_of_your_own_makes_pairs():
    def adaptive(field, start):
        times = torch.tensor([1.0, 0.0], dtype=torch.float64)
        return probability_flow(field, start, times, method="dopri5", rtol=1e-8, atol=1e-8)[-1]

    start = source(20, Key(0))
    fine = sample(EXACT, start, torch.linspace(1, 0, 401), solver=RungeKutta4())
    stored = reflow_pairs(EXACT, start, simulate=adaptive)
    torch.testing.assert_close(stored.data, fine, rtol=1e-5, atol=1e-5)
    assert torch.equal(Reflowed(EXACT, source, simulate=adaptive).draw(20, Key(0)).data, stored.data)


def test_modules_are_simulated_in_evaluation_mode_and_come_back():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(torch.ones_like(x))

    net = Noisy()
    pairs = reflow_pairs(Field(net, Straight()), torch.zeros(40, 2), [1.0, 0.0])
    assert torch.equal(pairs.data, -torch.ones(40, 2))
    assert net.training
    assert net.drop.training

    class Failing(Noisy):
        def forward(self, x, t):
            raise RuntimeError("broken")

    net = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        reflow_pairs(Field(net, Straight()), torch.zeros(4, 2), [1.0, 0.0])
    assert net.drop.training


def test_conditions_go_through_the_simulation_and_stay_with_the_pairs():
    labels = torch.arange(6.0)
    field = Field(lambda x, t, label: label[:, None].expand_as(x), Straight())
    pairs = reflow_pairs(field, torch.zeros(6, 1), [1.0, 0.0], batch=4, conditions={"label": labels})
    assert torch.equal(pairs.data[:, 0], -labels)
    pair = pairs.draw(20, Key(0))
    assert torch.equal(pair.data[:, 0], -pair.conditions["label"])


def test_reflow_trains_copies_and_leaves_the_teacher_alone():
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    field = Field(net, Straight())
    seen = []

    def fit(current, pairs):
        seen.append((current.network, pairs))
        assert current.network is not net
        assert current.coupled
        return fitted(current, pairs, steps=3)

    found = reflow(field, source(64, Key(0)), fit, TIMES[::8], rounds=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found[0].network is seen[0][0]
    assert found[1].network is seen[1][0] is not found[0].network
    # the second round's pairs are those of the first round's flow, from the same source
    assert torch.equal(seen[1][1].source, seen[0][1].source)
    with torch.no_grad():
        expected = sample(found[0], source(64, Key(0)), TIMES[::8])
    torch.testing.assert_close(seen[1][1].data, expected)
    assert not torch.equal(seen[1][1].data, seen[0][1].data)
    with pytest.raises(ArgumentError, match="noise"):
        found[0].predict("score", torch.zeros(1, 2), 0.5)


def test_reflow_on_streamed_pairs_sees_new_ones_at_every_draw():
    seen = []

    def fit(current, pairs):
        assert isinstance(pairs, Reflowed)
        seen.extend(pairs.draw(4, Key(0, step)).source for step in range(2))
        return fitted(current, pairs, steps=2)

    found = reflow(Field(Net(), Straight()), source, fit, TIMES[::8], solver=Heun())
    assert found[0].coupled
    assert not torch.equal(seen[0], seen[1])


def test_one_reflow_makes_a_trained_flow_straight_and_one_step_good():
    """From the exact first flow: S and the one-step distance fall, the cost does not rise, the law stays."""
    start = source(4000, Key(1))
    pairs = reflow_pairs(EXACT, start, TIMES, solver=RungeKutta4())
    (second,) = reflow(
        EXACT,
        start,
        lambda field, pairs: fitted(field, pairs, 500),
        TIMES,
        solver=RungeKutta4(),
        start=lambda field: Field(Net(), field.path, coupled=True),
    )
    fresh, (data, _) = source(600, Key(2)), PAIR.data.sample(600, Key(3))
    first_path = follow(EXACT, fresh, TIMES, solver=RungeKutta4())
    with torch.no_grad():
        second_path = follow(second, fresh, TIMES)
        once = sample(second, fresh, [1.0, 0.0], solver=Euler())
        exact_once = sample(EXACT, fresh, [1.0, 0.0], solver=Euler())
    assert float(second_path.straightness().mean()) < 0.1 * float(first_path.straightness().mean())
    assert float(energy_distance(once, data)) < 0.1 * float(energy_distance(exact_once, data))
    before, after = (float(transport_cost(path.data, fresh).mean()) for path in (first_path, second_path))
    assert after < 1.05 * before
    assert len(pairs) == 4000


def test_shuffling_the_ends_apart_silently_reverts_to_independent_pairs():
    """The pitfall that joint storage excludes: lines cross again, and the loss cannot fall."""
    start = source(4000, Key(1))
    pairs = reflow_pairs(EXACT, start, TIMES, solver=RungeKutta4())
    torch.manual_seed(0)
    shuffled = Paired(pairs.data[torch.randperm(4000)], pairs.source)
    losses = []
    for given in (pairs, shuffled):
        field = fitted(Field(Net(), Straight(), coupled=True), given)
        with torch.no_grad():
            losses.append(float(rectified_loss(field, given.data, given.source, key=Key(0)).mean()))
    assert losses[0] < 0.1 * losses[1]


def test_one_step_distillation_is_the_slice_of_the_loss_at_noise():
    field = Field(Net(), Straight(), coupled=True)
    data, start = torch.randn(2, 16, 2, dtype=torch.float64)
    sliced = rectified_loss(field, data, start, t=torch.ones(16, dtype=torch.float64))
    assert torch.equal(distillation_loss(field, data, start), sliced)
    once = sample(field, start, [1.0, 0.0], solver=Euler())
    torch.testing.assert_close(sliced, (once - data).square().mean(1))
    perceptual = distillation_loss(field, data, start, distance=pseudo_huber)
    torch.testing.assert_close(perceptual, pseudo_huber(once, data))


def test_distillation_in_steps_looks_at_the_times_of_these_steps_alone():
    seen = []

    def network(x, t):
        seen.append(t)
        return x

    field = Field(network, Straight(), coupled=True)
    rows = torch.zeros(4000, 1)
    distillation_loss(field, rows, rows, steps=4, key=Key(0))
    values, counts = seen[0].unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert bool(((counts - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all())


def test_distillation_copies_the_pairs_where_rectification_makes_new_ones():
    """Pairs (x, -x) all cross at 0: a one-step student repeats them, the rectified flow stands still."""
    start = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]], dtype=torch.float64).repeat(100, 1)
    pairs = Paired(-start, start)
    # one step from the source sees each pair by itself
    copying = Field(lambda x, t: 2 * x, Straight(), coupled=True)
    assert float(distillation_loss(copying, pairs.data, pairs.source).max()) == 0
    torch.testing.assert_close(sample(copying, start, [1.0, 0.0], solver=Euler()), pairs.data)
    rectified = nearest_pairs_field(pairs, neighbors=400, bandwidth=0.3)
    ends = sample(rectified, start, torch.linspace(1, 0, 201), solver=Euler())
    costs = [float(transport_cost(end, start).mean()) for end in (pairs.data, ends)]
    assert costs[1] < 0.7 * costs[0]


def test_the_flow_of_stored_pairs_follows_lines_that_do_not_cross():
    start = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None]
    field = nearest_pairs_field(Paired(3 + 2 * start, start), neighbors=1)
    for t in (1.0, 0.6, 0.2):
        x = (1 - t) * (3 + 2 * start) + t * start
        torch.testing.assert_close(field(x, t), start - (3 + 2 * start), rtol=1e-9, atol=1e-9)
    mixed = torch.tensor([0.6, 0.2], dtype=torch.float64).repeat(200)
    x = ((1 - mixed) * (3 + 2 * start[:400, 0]) + mixed * start[:400, 0])[:, None]
    torch.testing.assert_close(field(x, mixed), (-3 - start)[:400], rtol=1e-6, atol=1e-6)


def test_the_flow_of_stored_pairs_tends_to_the_exact_one():
    """The paper's toy model: with neighbours and a bandwidth it is a kernel regression of the velocity."""
    data, start, _ = PAIR.draw(20000, Key(0))
    field = nearest_pairs_field(Paired(data, start), neighbors=200, bandwidth=0.3)
    x = Straight().noised(data[:200], start[:200], 0.5)
    error = (field(x, 0.5) - EXACT(x, 0.5)).square().mean().sqrt()
    assert float(error) < 0.25 * float(EXACT(x, 0.5).square().mean().sqrt())


FIELD = Field(lambda x, t: x, Straight())
ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: reflow_pairs(FIELD, ROWS), "times"),
        (lambda: reflow_pairs(FIELD, ROWS, [1.0, 0.5]), "times"),
        (lambda: reflow_pairs(FIELD, ROWS, [0.0, 1.0]), "times"),
        (lambda: reflow_pairs(FIELD, ROWS, [1.0, 0.0], solver=DDIM(eta=1.0)), "solver"),
        (lambda: reflow_pairs(FIELD, ROWS, [1.0, 0.0], batch=0), "batch"),
        (lambda: reflow_pairs(FIELD, ROWS[:0], [1.0, 0.0]), "source"),
        (lambda: reflow_pairs(FIELD, ROWS, simulate=lambda f, x: x[:1]), "simulate"),
        (lambda: reflow_pairs(FIELD, ROWS, simulate=lambda f, x: x, solver=Euler()), "solver"),
        (lambda: reflow(FIELD, ROWS, lambda f, p: f, [1.0, 0.0], rounds=0), "rounds"),
        (lambda: reflow(FIELD, source, lambda f, p: f, [1.0, 0.0], conditions={"a": ROWS}), "conditions"),
        (lambda: reflow_pairs(FIELD, ROWS, [1.0, 0.0], conditions={"a": ROWS[:1]}), "conditions['a']"),
        (lambda: distillation_loss(FIELD, ROWS, ROWS, steps=0), "steps"),
        (lambda: distillation_loss(FIELD, ROWS, ROWS[:1]), "source"),
        (lambda: nearest_pairs_field(Paired(ROWS, ROWS), neighbors=0), "neighbors"),
        (lambda: nearest_pairs_field(Paired(ROWS, ROWS), bandwidth=0.0), "bandwidth"),
        (lambda: nearest_pairs_field(Paired(ROWS, ROWS))(torch.zeros(2, 3), 0.5), "x"),
    ],
    ids=[
        "none", "half", "rising", "noisy", "batch", "empty", "simulate", "both", "rounds", "conditions",
        "few", "steps", "rows", "neighbors", "bandwidth", "features",
    ],
)  # fmt: skip
def test_bad_calls_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_a_network_that_cannot_be_copied_needs_a_start():
    """A copied closure would train the teacher itself."""
    net = Net()
    closed = Field(lambda x, t: net(x, t), Straight())
    joined = Field(net, Straight(), "data").converted("velocity")
    for field in (closed, joined):
        with pytest.raises(ArgumentTypeError, match="start="):
            reflow(field, torch.full((3, 2), 0.5).double(), lambda f, p: f, [1.0, 0.01])


def test_types_are_refused_by_name():
    with pytest.raises(ArgumentTypeError, match="fit"):
        reflow(FIELD, ROWS, None, [1.0, 0.0])
    with pytest.raises(ArgumentTypeError, match="fit"):
        reflow(FIELD, ROWS, lambda f, p: None, [1.0, 0.0], start=lambda f: f)
    with pytest.raises(ArgumentTypeError, match="source"):
        Reflowed(FIELD, ROWS, [1.0, 0.0])
    with pytest.raises(ArgumentTypeError, match="simulate"):
        reflow_pairs(FIELD, ROWS, simulate=3)
    with pytest.raises(NonFiniteError):
        reflow_pairs(Field(lambda x, t: x / 0, Straight()), ROWS + 1, [1.0, 0.0])
    with pytest.raises(NonFiniteError):
        reflow_pairs(FIELD, ROWS, simulate=lambda field, x: x + torch.nan)
