"""Consistency models and trajectories, progressive distillation: the losses leave exact maps alone."""

import math

import pytest
import torch
from maps import GAUSSIAN, Net, consistency, flow, mean_flow, trajectory

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.flows import (
    DDIM,
    ConsistencyModel,
    ConsistencyTrajectory,
    Cosine,
    Field,
    MeanFlow,
    Straight,
    VarianceExploding,
    adaptive_decay,
    consistency_loss,
    data_weight,
    flow_step,
    progressive_distillation_loss,
    progressive_intervals,
    pseudo_huber,
    sample,
    time_grid,
    trajectory_loss,
)
from thalweg.flows.progressive_distillation import progressive_target
from thalweg.noise import Key

PATHS = {"straight": Straight(), "cosine": Cosine(), "variance_exploding": VarianceExploding(5.0)}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
DATA, _ = GAUSSIAN.sample(24, Key(0))
NOISE = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def grid(path, steps, last=0.05):
    return time_grid(path, steps, last=last, first=0.95)


@every_path
def test_the_exact_consistency_model_is_left_alone_by_a_fine_teacher(path):
    """Its distillation loss falls with the teacher's local error: the square of the third power."""

    def loss(steps):
        given = {"noise": NOISE, "index": torch.full((24,), steps // 2)}
        return float(
            consistency_loss(
                consistency(path, 0.05), DATA, grid(path, steps), teacher=GAUSSIAN.field(path), **given
            ).mean()
        )

    coarse, fine = loss(8), loss(32)
    assert fine < coarse * 4.0**-5
    assert fine < 1e-8


def test_consistency_training_has_the_right_gradient_only_in_the_limit():
    """Without a teacher the loss of the exact model does not vanish, but its gradient's mean falls."""
    path, count = VarianceExploding(5.0), 20000
    data, _ = GAUSSIAN.sample(count, Key(0))
    noise = torch.randn_like(data)
    model = consistency(path, 0.05)

    def residual(steps):
        times = grid(path, steps)
        s, t = (times[steps // 2 + k].expand(count) for k in (0, 1))
        x, earlier = (path.noised(data, noise, at) for at in (s, t))
        difference = model(x, s, 0.05) - model(earlier, t, 0.05)
        # relative to the step: what an optimizer would see
        return float((difference * torch.tanh(x)).mean().abs() / (s[0] - t[0])), difference

    coarse, spread = residual(2)
    fine, _ = residual(64)
    assert float(spread.std()) > 0.1
    assert coarse > 3 * fine


@every_path
@pytest.mark.parametrize("in_data", [True, False], ids=["in_data", "at_end"])
def test_the_exact_trajectory_is_left_alone_by_a_fine_teacher(path, in_data):
    def loss(steps):
        index = torch.full((24,), steps // 2)
        end = torch.full((24,), steps // 2 + steps // 4)
        return float(
            trajectory_loss(
                trajectory(path), GAUSSIAN.field(path), DATA, grid(path, steps),
                index=index, end=end, noise=NOISE, in_data=in_data,
            ).mean()
        )  # fmt: skip

    coarse, fine = loss(8), loss(32)
    assert fine < coarse * 4.0**-5
    assert fine < 1e-8


def test_trajectories_contain_consistency_models():
    """With all ends at the data, on VE, the loss of g is that of the consistency model with its network."""
    path, net = VarianceExploding(5.0), Net(1)
    times = time_grid(path, 8, last=0.0)
    index = torch.arange(24) % 7
    teacher = GAUSSIAN.field(path)
    model = ConsistencyModel(net, path, sigma_data=0.7)
    jumps = ConsistencyTrajectory(lambda x, s, t: model.to_data(x, s), path)
    given = {"index": index, "noise": NOISE, "solver": "ddim"}
    first = consistency_loss(model, DATA, times, teacher=teacher, **given)
    for in_data in (False, True):
        second = trajectory_loss(
            jumps, teacher, DATA, times, end=torch.full((24,), 8), in_data=in_data, **given
        )
        torch.testing.assert_close(second, first, rtol=1e-11, atol=1e-12)
        mine, theirs = (torch.autograd.grad(loss.mean(), net.inner[0].weight, retain_graph=True)[0]
                        for loss in (first, second))  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@every_path
def test_trajectory_and_mean_flow_errors_differ_by_a_known_factor(path):
    """|G - Psi|^2 = (t - s)^2 |h - h*|^2 for one model written both ways."""
    net = Net(2)
    model = ConsistencyTrajectory(net, path)
    s = torch.linspace(0.3, 0.95, 24, dtype=torch.float64)
    t = s / 3
    x = path.noised(DATA, NOISE, s)
    exact = flow(x, s, t, path)
    length = (t - s)[:, None]
    same = MeanFlow(lambda x, s, t: (model(x, s, t) - x) / (t - s)[:, None], path)
    jumps = (model(x, s, t) - exact).square().sum(1)
    errors = (same.mean_velocity(x, s, t) - mean_flow(path).mean_velocity(x, s, t)).square().sum(1)
    torch.testing.assert_close(jumps, length[:, 0] ** 2 * errors, rtol=1e-9, atol=1e-12)
    assert float(jumps.detach().min()) > 1e-6


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_losses_are_their_definitions(solver):
    path, net, other = Cosine(), Net(1), Net(1)
    times, index = grid(path, 8), torch.arange(24) % 8
    teacher = GAUSSIAN.field(path)
    model, target = (ConsistencyModel(n, path, 0.05) for n in (net, other))
    s, t = times[index], times[index + 1]
    x = path.noised(DATA, NOISE, s)
    earlier = flow_step(teacher, x, s, t, solver)
    expected = (model(x, s, 0.05) - target(earlier, t, 0.05)).square().mean(1)
    given = {"index": index, "noise": NOISE, "target": target, "solver": solver}
    torch.testing.assert_close(consistency_loss(model, DATA, times, teacher=teacher, **given), expected)
    trained = consistency_loss(model, DATA, times, **given)
    expected = (model(x, s, 0.05) - target(path.noised(DATA, NOISE, t), t, 0.05)).square().mean(1)
    torch.testing.assert_close(trained, expected)
    huber = consistency_loss(model, DATA, times, distance=pseudo_huber, **given)
    assert huber.shape == (24,)


def test_targets_carry_no_gradient():
    path, net, other = Straight(), Net(1), Net(1)
    times = grid(path, 8)
    model = ConsistencyModel(net, path, 0.05)
    given = {"noise": NOISE, "index": torch.arange(24) % 8}
    consistency_loss(model, DATA, times, target=model.with_network(other), **given).mean().backward()
    assert all(p.grad is None for p in other.parameters())
    # agreeing with itself, the gradient is that with a frozen copy
    copy = Net(1)
    copy.load_state_dict(net.state_dict())
    copy.requires_grad_(False)
    mine, theirs = (
        torch.autograd.grad(
            consistency_loss(model, DATA, times, target=target, **given).mean(), net.inner[0].weight
        )[0]
        for target in (None, model.with_network(copy))
    )
    assert torch.equal(mine, theirs)


def test_a_trajectorys_outer_jump_passes_the_gradient_and_takes_none():
    """In data space the model is differentiated through the target's jump, whose weights are left alone."""
    path, net, other = Straight(), Net(2), Net(2)
    times, index, end = grid(path, 8), torch.arange(24) % 7, torch.full((24,), 7)
    teacher = GAUSSIAN.field(path)
    model = ConsistencyTrajectory(net, path)
    given = {"noise": NOISE, "index": index, "end": end}
    target = ConsistencyTrajectory(lambda x, s, t: other(x, s, t), path)
    loss = trajectory_loss(model, teacher, DATA, times, target=target, **given)
    mine = torch.autograd.grad(loss.mean(), list(net.parameters()), retain_graph=True)
    s, u, t = times[index], times[index + 1], times[end]
    x = path.noised(DATA, NOISE, s)
    last = float(times[-1])
    with torch.no_grad():
        wanted = target(target(flow_step(teacher, x, s, u), u, t), t, last)
    by_hand = (target(model(x, s, t), t, last) - wanted).square().mean(1)
    torch.testing.assert_close(loss, by_hand)
    for a, b in zip(mine, torch.autograd.grad(by_hand.mean(), list(net.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    loss.mean().backward()
    assert all(p.grad is None for p in other.parameters())
    again = trajectory_loss(model, teacher, DATA, times, target=target, **given).mean()
    with pytest.raises(UnsupportedError, match="second derivative"):
        torch.autograd.grad(again, list(net.parameters()), create_graph=True)


def test_intervals_and_ends_are_drawn_evenly():
    path, count = Straight(), 6000
    times = time_grid(path, 3, last=0.1)
    seen = []

    def network(x, s, t):
        seen.append(torch.stack([s, t], 1))
        return x

    model = ConsistencyTrajectory(network, path)
    teacher = Field(lambda x, t: x, path, "data")
    with torch.no_grad():
        trajectory_loss(model, teacher, torch.zeros(count, 1), times, in_data=False, key=Key(0))
    found = seen[1]
    for first in range(3):
        rows = found[(found[:, 0] - float(times[first])).abs() < 1e-6]
        assert abs(len(rows) - count / 3) < 5 * math.sqrt(count * 2 / 9)
        for end in range(first + 1, 4):
            share = float(((rows[:, 1] - float(times[end])).abs() < 1e-6).double().mean())
            chance = 1 / (3 - first)
            assert abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / len(rows))


def test_the_schedule_of_training_is_the_papers():
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 and mu = exp(s0 log mu0 / N)."""
    counts = [progressive_intervals(k, 400) for k in range(401)]
    assert counts[0] == 2
    assert counts[-1] == 151
    assert counts == sorted(counts)
    assert counts[100] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert adaptive_decay(2) == pytest.approx(0.9, rel=1e-12)
    assert adaptive_decay(20, first=2, decay=0.9) == pytest.approx(0.9 ** (2 / 20), rel=1e-12)


@every_path
def test_progressive_target_makes_one_step_of_two(path):
    """The student that predicts it lands where two steps of the teacher land, at any place of the grid."""
    teacher = GAUSSIAN.field(path, "data")
    x = path.noised(DATA, NOISE, torch.full((24,), 0.9, dtype=torch.float64))
    student = Field(lambda x, t: progressive_target(teacher, x, t.double(), t.double() - 0.2), path, "data")
    found = sample(student, x, [0.9, 0.7, 0.5, 0.3], solver=DDIM())
    expected = sample(teacher, x, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], solver=DDIM())
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    # and not where one step of the teacher lands
    single = sample(teacher, x, [0.9, 0.7, 0.5, 0.3], solver=DDIM())
    assert float((single - expected).abs().max()) > 1e-3


def test_progressive_target_in_sigma_is_the_papers_formula():
    """x_t - t (x_q - x_t) / (q - t), in sigma."""
    path = VarianceExploding(5.0)
    teacher = GAUSSIAN.field(path, "data")
    s, t = (torch.full((24,), at, dtype=torch.float64) for at in (0.8, 0.4))
    x = path.noised(DATA, NOISE, s)
    end = flow_step(teacher, flow_step(teacher, x, s, (s + t) / 2, "ddim"), (s + t) / 2, t, "ddim")
    expected = x - 5 * 0.8 * (end - x) / (5 * 0.4 - 5 * 0.8)
    torch.testing.assert_close(progressive_target(teacher, x, s, t), expected, rtol=1e-11, atol=1e-11)


@every_path
def test_progressive_distillation_of_single_points_is_the_points(path):
    """For Dirac data every step is exact, so that the target is the point and the loss its error."""
    point = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    teacher = Field(lambda x, t: point.expand_as(x), path, "data")
    s, t = (torch.full((24,), at, dtype=torch.float64) for at in (0.9, 0.0))
    x = path.noised(point.expand(24, 2), NOISE, s)
    torch.testing.assert_close(
        progressive_target(teacher, x, s, t), point.expand(24, 2), rtol=1e-12, atol=1e-12
    )
    exact = progressive_distillation_loss(
        teacher, teacher, point.expand(24, 2), time_grid(path, 4, last=0.0, first=0.9), noise=NOISE
    )
    assert float(exact.max()) < 1e-20


def test_progressive_distillation_weighs_the_error_of_the_data():
    path, net = Cosine(), Net(1)
    times, index = time_grid(path, 4, last=0.0), torch.arange(24) % 4
    student, teacher = Field(net, path, "v"), GAUSSIAN.field(path)
    s, t = times[index], times[index + 1]
    x = path.noised(DATA, NOISE, s)
    error = (student.predict("data", x, s) - progressive_target(teacher, x, s, t)).square().mean(1)
    given = {"index": index, "noise": NOISE}
    found = progressive_distillation_loss(student, teacher, DATA, times, **given)
    torch.testing.assert_close(found, error * data_weight("truncated", path, s))
    plain = progressive_distillation_loss(student, teacher, DATA, times, weight="data", **given)
    torch.testing.assert_close(plain, error)
    found.mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_losses_keep_the_precision_and_any_shape(dtype):
    path = Straight()
    data = torch.randn(3, 2, 4, dtype=dtype)
    times = time_grid(path, 4, last=0.1)
    teacher = Field(lambda x, t: 0.5 * x, path, "data")
    for loss in (
        consistency_loss(ConsistencyModel(lambda x, s: x, path, 0.1), data, times),
        consistency_loss(ConsistencyModel(lambda x, s: x, path, 0.1), data, times, teacher=teacher),
        trajectory_loss(ConsistencyTrajectory(lambda x, s, t: x, path), teacher, data, times),
        progressive_distillation_loss(teacher, teacher, data, times),
    ):
        assert loss.shape == (3,)
        assert loss.dtype == dtype


def test_losses_compile():
    path, net = Straight(), Net(1)
    times, index = grid(path, 4), torch.arange(24) % 4
    model = ConsistencyModel(net, path, 0.05)
    teacher = Field(lambda x, t: 0.5 * x, path, "data")

    def losses(data, noise):
        first = consistency_loss(model, data, times, teacher=teacher, index=index, noise=noise)
        return first, progressive_distillation_loss(
            model_field, teacher, data, times, index=index, noise=noise
        )

    model_field = Field(net, path, "data")
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(compiled(DATA, NOISE), losses(DATA, NOISE)):
        torch.testing.assert_close(mine, theirs)


def test_a_compiled_trajectory_loss_has_the_same_gradient():
    """The outer jump breaks the graph; the gradient through it stays."""
    path, net = Straight(), Net(2)
    times, index = grid(path, 4), torch.arange(24) % 3
    model, teacher = ConsistencyTrajectory(net, path), Field(lambda x, t: 0.5 * x, path, "data")

    def loss(data, noise):
        return trajectory_loss(
            model, teacher, data, times, index=index, end=torch.full_like(index, 3), noise=noise
        ).mean()

    found, expected = (
        torch.autograd.grad(f(DATA, NOISE), list(net.parameters()))
        for f in (torch.compile(loss, backend="aot_eager"), loss)
    )
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


MODEL = ConsistencyModel(lambda x, s: x, Straight(), 0.05)
JUMPS = ConsistencyTrajectory(lambda x, s, t: x, Straight())
TEACHER = Field(lambda x, t: x, Straight(), "data")
TIMES = grid(Straight(), 4)
INDEX = torch.zeros(24, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: consistency_loss(MODEL, DATA, TIMES.flip(0)), "times"),
        (lambda: consistency_loss(MODEL, DATA, TIMES[:-1]), "times"),
        (lambda: consistency_loss(MODEL, DATA, TIMES[:1]), "times"),
        (lambda: consistency_loss(MODEL, torch.tensor(1.0), TIMES), "data"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, index=INDEX + 4), "index"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, index=INDEX.float()), "index"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, noise=NOISE[:3]), "noise"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, teacher=TEACHER, solver="rk4"), "solver"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, teacher=TEACHER.on(Cosine())), "teacher"),
        (lambda: consistency_loss(MODEL, DATA, TIMES, distance=lambda a, b: (a - b).sum()), "distance"),
        (lambda: trajectory_loss(JUMPS, TEACHER, DATA, TIMES, index=INDEX, end=INDEX), "end"),
        (lambda: trajectory_loss(JUMPS, TEACHER, DATA, TIMES, end=INDEX + 5), "end"),
        (lambda: progressive_distillation_loss(TEACHER, TEACHER.on(Cosine()), DATA, TIMES), "teacher"),
        (lambda: progressive_distillation_loss(TEACHER, TEACHER, DATA, TIMES, weight="best"), "weight"),
        (lambda: progressive_intervals(5, 4), "step"),
        (lambda: adaptive_decay(2, decay=1.0), "decay"),
    ],
    ids=[
        "rising", "end_of_map", "single", "scalar", "interval", "index", "noise", "solver", "path",
        "distance", "end", "late_end", "progressive_path", "weight", "step", "decay",
    ],
)  # fmt: skip
def test_bad_calls_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


@pytest.mark.parametrize(
    "make",
    [
        lambda: consistency_loss(JUMPS, DATA, TIMES),
        lambda: consistency_loss(MODEL, DATA, TIMES, target=JUMPS),
        lambda: trajectory_loss(MODEL, TEACHER, DATA, TIMES),
        lambda: trajectory_loss(JUMPS, None, DATA, TIMES),
        lambda: progressive_distillation_loss(MODEL, TEACHER, DATA, TIMES),
        lambda: consistency_loss(MODEL, DATA, TIMES, key=3),
    ],
    ids=["model", "target", "trajectory", "teacher", "student", "key"],
)
def test_types_are_refused_by_name(make):
    with pytest.raises(ArgumentTypeError):
        make()
