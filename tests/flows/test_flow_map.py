"""Flow maps: the exact map in every parametrisation, sampling, policies."""

import math

import pytest
import torch
from maps import CENTRE, DEVIATION, GAUSSIAN, Net, consistency, flow, mean_flow, trajectory, velocity

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    DDIM,
    ConsistencyModel,
    ConsistencyTrajectory,
    Cosine,
    Euler,
    Field,
    FlowMap,
    Heun,
    MeanFlow,
    Straight,
    VarianceExploding,
    VariancePreserving,
    average_weights_,
    flow_step,
    sample,
    sample_map,
)
from thalweg.ledger import price
from thalweg.noise import Key
from thalweg.rollouts import Checkpointed, Truncated
from thalweg.step import Backprop, Step

PATHS = {
    "straight": Straight(),
    "cosine": Cosine(),
    "variance_preserving": VariancePreserving(),
    "variance_exploding": VarianceExploding(5.0),
}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
STEPS = {"ddim": DDIM(), "euler": Euler(), "heun": Heun()}
S = torch.linspace(0.3, 0.95, 20, dtype=torch.float64)
T = S * torch.linspace(0.1, 0.9, 20, dtype=torch.float64)


def states(path, s=S):
    data, _ = GAUSSIAN.sample(len(s), Key(0))
    return path.noised(data, torch.randn_like(data), s)


@every_path
def test_the_gaussian_flow_map_is_a_semigroup(path):
    """Psi_{u->t} Psi_{s->u} = Psi_{s->t}."""
    x, u = states(path), (S + T) / 2
    direct = flow(x, S, T, path)
    torch.testing.assert_close(flow(flow(x, S, u, path), u, T, path), direct, rtol=1e-13, atol=1e-13)
    for index in (0, 10, 19):
        rows = slice(index, index + 1)
        oracle = GAUSSIAN.flow(x[rows], float(S[index]), float(T[index]), path)
        torch.testing.assert_close(direct[rows], oracle, rtol=1e-12, atol=1e-12)


@every_path
def test_the_gaussian_flow_map_moves_with_the_velocity(path):
    """d Psi / dt = U(Psi, t)."""
    x = states(path)
    landed, rate = torch.func.jvp(lambda t: flow(x, S, t, path), (T,), (torch.ones_like(T),))
    torch.testing.assert_close(rate, velocity(landed, T, path), rtol=1e-11, atol=1e-11)


@every_path
@pytest.mark.parametrize("make", [trajectory, mean_flow], ids=["trajectory", "mean_flow"])
def test_every_parametrisation_holds_the_same_map(path, make):
    x = states(path)
    torch.testing.assert_close(make(path)(x, S, T), flow(x, S, T, path), rtol=1e-12, atol=1e-12)


@every_path
@pytest.mark.parametrize("least", [0.0, 0.02])
def test_a_consistency_model_holds_the_map_to_the_data(path, least):
    x = states(path)
    end = torch.full_like(S, least)
    found = consistency(path, least)(x, S, least)
    torch.testing.assert_close(found, flow(x, S, end, path), rtol=1e-11, atol=1e-11)


@every_path
def test_the_map_from_a_time_to_itself_is_the_identity_by_construction(path):
    """For any network, also at the ends: not by a penalty."""
    wild = Net(2)
    x = torch.randn(5, 2, dtype=torch.float64)
    for s in (0.0, 0.3, 1.0):
        for model in (ConsistencyTrajectory(wild, path), MeanFlow(wild, path)):
            torch.testing.assert_close(model(x, s, s), x, rtol=0, atol=1e-15)
    for least in (0.0, 0.02):
        model = ConsistencyModel(Net(1), path, least)
        torch.testing.assert_close(model(x, least, least), x, rtol=1e-14, atol=1e-14)


def test_consistency_shares_are_those_of_the_paper_in_sigma():
    """c_skip = d^2 / ((s - s_min)^2 + d^2), c_out = d (s - s_min) / sqrt(s^2 + d^2), c_in as in EDM."""
    path, least, d = VarianceExploding(80.0), 0.002 / 80, 0.5
    net = Net(1)
    model = ConsistencyModel(net, path, least, d)
    x, t = torch.randn(6, 2, dtype=torch.float64) * 5, torch.linspace(0.01, 1, 6, dtype=torch.float64)
    s = (80 * t)[:, None]
    skip = d**2 / ((s - 0.002) ** 2 + d**2)
    out = d * (s - 0.002) / (s**2 + d**2).sqrt()
    expected = skip * x + out * net(x / (s**2 + d**2).sqrt(), t)
    torch.testing.assert_close(model(x, t, least), expected, rtol=1e-10, atol=1e-12)


def test_trajectory_is_the_formula_of_the_paper_in_sigma():
    """G = (t / s) x + (1 - t / s) g."""
    net = Net(2)
    model = ConsistencyTrajectory(net, VarianceExploding(80.0))
    x, ratio = torch.randn(20, 2, dtype=torch.float64), (T / S)[:, None]
    torch.testing.assert_close(model(x, S, T), ratio * x + (1 - ratio) * net(x, S, T))


def test_a_network_that_ignores_the_end_makes_the_trajectory_a_step_of_ddim():
    net = Net(1)
    path = Cosine()
    model = ConsistencyTrajectory(lambda x, s, t: net(x, s), path)
    x = states(path)
    expected = flow_step(Field(net, path, "data"), x, S, T, "ddim")
    torch.testing.assert_close(model(x, S, T), expected)
    torch.testing.assert_close(model.field()(x, S), net(x, S))


@every_path
@pytest.mark.parametrize(
    ("name", "solver"),
    [("ddim", DDIM()), ("euler", Euler()), ("heun", Heun())],
    ids=["ddim", "euler", "heun"],
)
def test_a_teachers_step_is_that_of_the_sampler(name, solver, path):
    field = GAUSSIAN.field(path, "noise")
    x = states(path, S[:3])
    found = flow_step(field, x, S[:3], T[:3], name)
    for index in range(3):
        rows = slice(index, index + 1)
        expected = sample(field, x[rows], [float(S[index]), float(T[index])], solver=solver)
        torch.testing.assert_close(found[rows], expected, rtol=1e-11, atol=1e-11)


@every_path
@pytest.mark.parametrize("make", [trajectory, mean_flow], ids=["trajectory", "mean_flow"])
def test_jumps_of_an_exact_map_do_not_depend_on_how_many(path, make):
    x = states(path)
    times = [0.95, 0.6, 0.3, 0.1]
    one, many = (sample_map(make(path), x, grid) for grid in ([0.95, 0.1], times))
    torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)
    steps = sample_map(make(path), x, times, trajectory=True)
    assert len(steps) == 4
    assert torch.equal(steps[-1], many)


@every_path
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_fresh_noise_between_jumps_keeps_the_law(path, gamma):
    """The exact map carries p_s to p_t, and noise added back restores the level: mean and covariance."""
    count, last = 4000, 0.05
    times = [0.9, 0.6, 0.3, last]
    x = states(path, torch.full((count,), 0.9, dtype=torch.float64))
    found = sample_map(mean_flow(path), x, times, gamma=gamma, key=Key(1))
    alpha, sigma = path.coefficients(last)[:2]
    mean = alpha * torch.tensor(CENTRE, dtype=torch.float64)
    variance = float(alpha**2 * DEVIATION**2 + sigma**2)
    away = (found.mean(0) - mean) / math.sqrt(variance / count)
    assert float(away.abs().max()) < 5
    assert bool(((found.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / count)).all())


def test_fresh_noise_is_what_gamma_says():
    """In sigma: the jump goes to sqrt(1 - gamma^2) t, and gamma t is added back."""
    path, gamma = VarianceExploding(2.0), 0.6
    seen = []

    def network(x, s, t):
        seen.append((float(s[0]), float(t[0])))
        return torch.zeros_like(x)

    x = torch.zeros(20000, 1, dtype=torch.float64)
    found = sample_map(MeanFlow(network, path), x, [1.0, 0.5, 0.25], gamma=gamma, key=Key(0))
    assert seen == [(1.0, pytest.approx(0.8 * 0.5)), (0.5, 0.25)]
    assert abs(float(found.std()) - gamma * 1.0) < 5 * 0.6 / math.sqrt(2 * 20000)


def test_multistep_consistency_sampling_goes_to_the_data_and_back():
    path, least = VarianceExploding(2.0), 0.05
    seen = []

    def network(x, s):
        seen.append(float(s[0]))
        return torch.zeros_like(x)

    model = ConsistencyModel(network, path, least)
    x = torch.zeros(20000, 1, dtype=torch.float64)
    first = sample_map(model, x, [1.0, 0.5, least], key=Key(0), trajectory=True)
    assert seen == [1.0, 0.5]
    # sqrt(t^2 - least^2) of noise is added to data at `least`
    expected = math.sqrt(1.0 - 0.1**2)
    assert abs(float(first[1].std()) - expected) < 5 * expected / math.sqrt(2 * 20000)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize(
    "policy", [Checkpointed(slots=2), Checkpointed(segments=2)], ids=["slots", "segments"]
)
@pytest.mark.parametrize("make", [MeanFlow, ConsistencyTrajectory], ids=["mean_flow", "trajectory"])
def test_every_exact_policy_agrees_with_backprop_through_jumps(make, policy, gamma):
    net = Net(2)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def gradients(policy):
        loss = sample_map(
            make(net, Cosine()),
            x,
            [0.9, 0.7, 0.5, 0.3, 0.1],
            gamma=gamma,
            gradient=policy,
            key=Key(0),
            then=lambda x: x.square().sum(),
        )
        return torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)

    for mine, exact in zip(gradients(policy), gradients(Backprop())):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)
    biased = gradients(Truncated(last=1))
    assert biased[0] is None
    assert not torch.allclose(biased[1], gradients(Backprop())[1])


def test_averaged_weights_are_the_target_that_is_called():
    """Not silently the online network: its output follows the average alone."""
    online, average = Net(2), Net(2)
    average.load_state_dict(online.state_dict())
    model = MeanFlow(online, Straight())
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    x = torch.randn(3, 2, dtype=torch.float64)
    target = model.with_network(average)
    before = target(x, 0.8, 0.1)
    assert not torch.allclose(before, model(x, 0.8, 0.1))
    average_weights_(average, online, 0.75)
    for mine, theirs in zip(average.parameters(), online.parameters()):
        torch.testing.assert_close(mine, theirs - 0.75)
    assert not torch.allclose(target(x, 0.8, 0.1), before)
    norm = torch.nn.BatchNorm1d(2)
    other = torch.nn.BatchNorm1d(2)
    norm(torch.randn(8, 2))
    average_weights_(other, norm, 0.9)
    assert torch.equal(other.running_mean, norm.running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_states_of_any_shape_keep_their_dtype(dtype):
    x = torch.randn(3, 1, 4, 4).to(dtype)
    for model in (
        MeanFlow(lambda x, s, t: x, Straight()),
        ConsistencyTrajectory(lambda x, s, t: x, Straight()),
        ConsistencyModel(lambda x, s: x, Straight()),
    ):
        found = sample_map(model, x, [1.0, 0.5, 0.0], key=Key(0))
        assert found.dtype == dtype
        assert found.shape == x.shape


def test_a_jump_compiles():
    net = Net(2)
    for make in (MeanFlow, ConsistencyTrajectory):
        model = make(net, Straight())

        def jump(x, s, t, model=model):
            return model(x, s, t)

        x = states(Straight())
        compiled = torch.compile(jump, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, S, T), jump(x, S, T))


@pytest.mark.parametrize("name", ["mean_flow", "trajectory", "consistency"])
def test_jumps_are_mapped_and_differentiated_both_ways(name):
    net = Net(1 if name == "consistency" else 2)
    make = {"mean_flow": MeanFlow, "trajectory": ConsistencyTrajectory, "consistency": ConsistencyModel}[name]
    model = make(net, Cosine())
    x = torch.randn(4, 2, dtype=torch.float64)

    def jump(x):
        return model(x, 0.8, 0.0)

    mapped = torch.func.vmap(lambda row: jump(row[None])[0])(x)
    torch.testing.assert_close(mapped, jump(x))
    forward = torch.func.jvp(jump, (x,), (torch.ones_like(x),))[1]
    backward = torch.func.vjp(jump, x)[1](forward)[0]
    torch.testing.assert_close((backward * torch.ones_like(x)).sum(), forward.square().sum())
    assert torch.autograd.gradcheck(jump, (x.clone().requires_grad_(),))


def test_losses_and_jumps_are_priced_without_being_run():
    from thalweg.flows import (
        consistency_loss,
        distillation_loss,
        mean_flow_loss,
        progressive_distillation_loss,
        rectified_loss,
        trajectory_loss,
    )

    one, two = Net(1), Net(2)
    data, noise = torch.randn(2, 8, 2, dtype=torch.float64)
    path = Straight()
    field, times = Field(one, path, "data"), torch.linspace(0.9, 0.1, 5)
    velocity = Field(one, path)
    jumps, flows = ConsistencyTrajectory(two, path), MeanFlow(two, path)
    ends = ConsistencyModel(one, path, 0.1)
    steps = {
        "rectified": (one, lambda: rectified_loss(velocity, data, noise)),
        "distillation": (one, lambda: distillation_loss(velocity, data, noise, steps=4)),
        "consistency": (one, lambda: consistency_loss(ends, data, times, teacher=field)),
        "trajectory": (two, lambda: trajectory_loss(jumps, field, data, times)),
        "mean_flow": (two, lambda: mean_flow_loss(flows, data)),
        "progressive": (one, lambda: progressive_distillation_loss(field, field, data, times)),
        "jumps": (two, lambda: sample_map(flows, noise, [1.0, 0.5, 0.0], gamma=0.5, key=Key(0)).sum(1)),
    }
    for name, (net, loss) in steps.items():
        step = Step(net, lambda loss=loss: loss().mean(), list(net.parameters()))
        assert price(step)[0].saved_bytes > 0, name


X = torch.zeros(3, 2)
MODEL = MeanFlow(lambda x, s, t: x, Straight())
DATA = ConsistencyModel(lambda x, s: x, Straight(), least=0.1)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: MODEL(X, 0.2, 0.5), "t"),
        (lambda: MODEL(X, 1.2, 0.5), "t"),
        (lambda: MODEL(X, torch.zeros(2), 0.0), "t"),
        (lambda: DATA(X, 0.5, 0.0), "t"),
        (lambda: MeanFlow(lambda x, s, t: x[:1], Straight())(X, 1.0, 0.0), "network"),
        (lambda: ConsistencyModel(lambda x, s: x, Straight(), least=1.0), "least"),
        (lambda: ConsistencyModel(lambda x, s: x, Straight(), sigma_data=0.0), "sigma_data"),
        (lambda: sample_map(MODEL, X, [0.0, 1.0]), "times"),
        (lambda: sample_map(MODEL, X, [1.0]), "times"),
        (lambda: sample_map(MODEL, X, [1.0, 0.5, 0.0], gamma=1.5), "gamma"),
        (lambda: sample_map(DATA, X, [1.0, 0.5, 0.1], gamma=0.5), "gamma"),
        (lambda: sample_map(DATA, X, [1.0, 0.0]), "times"),
        (lambda: sample_map(MODEL, torch.tensor(1.0), [1.0, 0.0]), "start"),
        (lambda: average_weights_(Net(1), Net(1), 1.0), "decay"),
        (lambda: average_weights_(Net(1, width=4), Net(1), 0.5), "average"),
        (lambda: flow_step(MODEL.field(), X, S[:3], T[:3], "rk4"), "solver"),
    ],
    ids=[
        "backwards", "late", "shape", "end", "output", "least", "sigma_data", "rising", "single", "gamma",
        "gamma_of_one_end", "last", "scalar", "decay", "average", "solver",
    ],
)  # fmt: skip
def test_bad_calls_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    with pytest.raises(ArgumentTypeError, match="network"):
        MeanFlow(None, Straight())
    with pytest.raises(ArgumentTypeError, match="path"):
        MeanFlow(lambda x, s, t: x, Straight)
    with pytest.raises(ArgumentTypeError, match="flow_map"):
        sample_map(Field(lambda x, t: x, Straight()), X, [1.0, 0.0])
    with pytest.raises(TypeError):
        FlowMap(lambda x, s, t: x, Straight())
    with pytest.raises(ArgumentTypeError, match="gamma"):
        sample_map(MODEL, X, [1.0, 0.0], gamma=True)
