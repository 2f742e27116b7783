"""Mean flow: the identity, one forward-mode product, a detached target, and what goes wrong without."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import GAUSSIAN, Net, flow, mean_flow, velocity
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    Cosine,
    Field,
    LogitNormal,
    MeanFlow,
    Straight,
    VarianceExploding,
    energy_distance,
    matching_loss,
    mean_flow_loss,
    sample_map,
)
from thalweg.flows.mean_flow import mean_flow_target
from thalweg.noise import Key

PATHS = {"straight": Straight(), "cosine": Cosine(), "variance_exploding": VarianceExploding(5.0)}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
S = torch.linspace(0.3, 0.95, 20, dtype=torch.float64)
T = S * torch.linspace(0.1, 0.9, 20, dtype=torch.float64)


def states(path):
    data, _ = GAUSSIAN.sample(len(S), Key(0))
    return path.noised(data, torch.randn_like(data), S)


@every_path
def test_the_mean_flow_identity_holds_for_the_exact_map(path):
    """h = U - (s - t) dh/ds along U (dry run 9e-16)."""
    x = states(path)
    found, wanted = mean_flow_target(mean_flow(path), x, velocity(x, S, path), S, T)
    scale = float(found.abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13 * max(1.0, scale))


def test_the_mean_flow_identity_needs_both_tangents():
    """Without the tangent of s, or with one for t, the exact map does not satisfy it: a negative test."""
    path = Straight()
    x, v = states(path), velocity(states(path), S, path)
    model = mean_flow(path)
    found = model.mean_velocity(x, S, T)
    zero, one = torch.zeros_like(S), torch.ones_like(S)
    for tangents in ((v, zero, zero), (v, one, one), (torch.zeros_like(x), one, zero)):
        rate = torch.func.jvp(model.mean_velocity, (x, S, T), tangents)[1]
        assert float((v - (S - T)[:, None] * rate - found).abs().max()) > 0.1


@every_path
def test_the_loss_of_the_exact_map_with_the_exact_velocity_is_zero(path):
    data, _ = GAUSSIAN.sample(20, Key(1))
    loss = mean_flow_loss(mean_flow(path), data, teacher=GAUSSIAN.field(path), s=S, t=T)
    assert float(loss.max()) < 1e-18 * float(velocity(states(path), S, path).square().max() + 1)


def test_with_lines_for_the_velocity_the_exact_map_is_stationary():
    """Without a teacher the residual averages out: no feature of (x, s, t) is left to learn."""
    path, count = Straight(), 40000
    data, _ = GAUSSIAN.sample(count, Key(0))
    noise = torch.randn_like(data)
    s, t = torch.full((count,), 0.8, dtype=torch.float64), torch.full((count,), 0.3, dtype=torch.float64)
    x = path.noised(data, noise, s)
    found, wanted = mean_flow_target(mean_flow(path), x, path.velocity(data, noise, s), s, t)
    residual = found - wanted
    for feature in (torch.ones_like(x), x, torch.sin(2 * x)):
        product = residual * feature
        assert bool((product.mean(0).abs() < 5 * product.std(0) / math.sqrt(count)).all())
    assert float(residual.std()) > 0.1


def test_equal_times_are_flow_matching():
    net = Net(2)
    model = MeanFlow(net, Cosine())
    data, noise = torch.randn(2, 20, 2, dtype=torch.float64)
    found = mean_flow_loss(model, data, noise=noise, s=S, t=S)
    torch.testing.assert_close(found, matching_loss(model.field(), data, noise=noise, t=S))


def test_the_target_carries_no_gradient():
    """The gradient is that of a regression on a constant, not that of the loss as written."""
    net = Net(2)
    model = MeanFlow(net, Straight())
    data, noise = torch.randn(2, 20, 2, dtype=torch.float64)
    parameters = list(net.parameters())
    mine = torch.autograd.grad(mean_flow_loss(model, data, noise=noise, s=S, t=T).mean(), parameters)
    x, v = Straight().noised(data, noise, S), noise - data
    rate = torch.func.jvp(net, (x, S, T), (v, torch.ones_like(S), torch.zeros_like(T)))[1]
    target = v - (S - T)[:, None] * rate
    plain = torch.autograd.grad((net(x, S, T) - target.detach()).square().mean(), parameters)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    through = torch.autograd.grad((net(x, S, T) - target).square().mean(), parameters)
    assert not torch.allclose(mine[0], through[0], rtol=1e-2)


def test_second_derivatives_are_those_of_the_regression_and_pass_gradgradcheck():
    """Double backward sees a constant target too."""
    net = Net(2, width=4)
    model = MeanFlow(net, Straight())
    data, noise = torch.randn(2, 6, 2, dtype=torch.float64)
    s, t = S[:6], T[:6]
    parameters = list(net.parameters())

    def product(loss):
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    x, v = Straight().noised(data, noise, s), noise - data
    with torch.no_grad():
        _, target = mean_flow_target(model, x, v, s, t)
    mine = product(mean_flow_loss(model, data, noise=noise, s=s, t=t).mean())
    plain = product((net(x, s, t) - target).square().mean())
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_the_derivative_is_taken_in_one_call_and_without_gradients_too():
    calls = []

    def network(x, s, t):
        calls.append(1)
        return torch.sin(x) * s[:, None] + t[:, None]

    data, noise = torch.randn(2, 20, 2, dtype=torch.float64)
    model = MeanFlow(network, Straight())
    with_gradients = mean_flow_loss(model, data, noise=noise, s=S, t=T)
    assert len(calls) == 1
    with torch.no_grad():
        without = mean_flow_loss(model, data, noise=noise, s=S, t=T)
    assert torch.equal(with_gradients, without)
    with torch.inference_mode():
        assert torch.equal(mean_flow_loss(model, data, noise=noise, s=S, t=T), without)


def test_the_adaptive_weight_divides_by_a_detached_power():
    net = Net(2)
    data, noise = torch.randn(2, 20, 2, dtype=torch.float64)
    given = {"noise": noise, "s": S, "t": T}
    plain = mean_flow_loss(MeanFlow(net, Straight()), data, **given)
    weighted = mean_flow_loss(MeanFlow(net, Straight()), data, power=0.5, **given)
    torch.testing.assert_close(weighted, plain / (plain + 1e-3) ** 0.5)
    mine = torch.autograd.grad(weighted.sum(), net.inner[0].weight)[0]
    weights = ((plain + 1e-3) ** -0.5).detach()
    theirs = torch.autograd.grad((weights * plain).sum(), net.inner[0].weight)[0]
    torch.testing.assert_close(mine, theirs)


class Attention(nn.Module):
    """Attention over the two features, by the fused operator that has no forward-mode rule."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 8).double()
        self.out = nn.Linear(8, 1).double()

    def forward(self, x, s, t):
        times = torch.stack([s, t], 1)[:, None].expand(-1, x.shape[1], -1).to(x)
        tokens = self.inner(torch.cat([x[:, :, None], times], 2))[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.out(mixed[:, 0])[:, :, 0]


def test_attention_is_differentiated_forward_by_the_math_kernel():
    net = Attention()
    data = torch.randn(20, 2, dtype=torch.float64)
    mean_flow_loss(MeanFlow(net, Straight()), data, s=S, t=T).mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.inner.parameters())


@pytest.mark.parametrize("instantaneous", [0.0, 0.25, 1.0])
def test_times_are_ordered_and_a_share_of_them_equal(instantaneous):
    seen = []

    def network(x, s, t):
        # jvp hands the network dual numbers, whose values these are
        seen.extend(torch.autograd.forward_ad.unpack_dual(value).primal for value in (s, t))
        return x

    count = 2000
    field = MeanFlow(network, Straight())
    with torch.no_grad():
        mean_flow_loss(
            field, torch.zeros(count, 1), instantaneous=instantaneous, law=LogitNormal(-0.4, 1.0), key=Key(0)
        )
    s, t = seen
    share = float((s == t).double().mean())
    assert bool((t <= s).all())
    assert abs(share - instantaneous) <= 5 * math.sqrt(instantaneous * (1 - instantaneous) / count)


def test_draws_come_from_the_key_or_from_torch():
    data = torch.randn(8, 2, dtype=torch.float64)
    model = MeanFlow(Net(2), Straight())
    assert torch.equal(mean_flow_loss(model, data, key=Key(1)), mean_flow_loss(model, data, key=Key(1)))
    assert not torch.equal(mean_flow_loss(model, data, key=Key(1)), mean_flow_loss(model, data, key=Key(2)))
    torch.manual_seed(3)
    first = mean_flow_loss(model, data)
    torch.manual_seed(3)
    assert torch.equal(mean_flow_loss(model, data), first)


def test_the_loss_and_its_gradient_compile():
    net = Net(2)
    model = MeanFlow(net, Straight())
    data, noise = torch.randn(2, 20, 2, dtype=torch.float64)

    def loss(data, noise, s, t):
        return mean_flow_loss(model, data, noise=noise, s=s, t=t).mean()

    plain = torch.autograd.grad(loss(data, noise, S, T), list(net.parameters()))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = compiled(data, noise, S, T)
    torch.testing.assert_close(value, loss(data, noise, S, T))
    for a, b in zip(torch.autograd.grad(value, list(net.parameters())), plain):
        torch.testing.assert_close(a, b)


def trained(steps, seed=0):
    """A small mean flow of a Gaussian, from its samples alone."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)).double()

    def network(x, s, t):
        return net(torch.cat([x, s[:, None], (s - t)[:, None]], 1))

    model = MeanFlow(network, Straight())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(steps):
        data, _ = GAUSSIAN.sample(256, Key(7, step))
        optimizer.zero_grad()
        mean_flow_loss(model, data, instantaneous=0.5, key=Key(8, step)).mean().backward()
        optimizer.step()
    return model


def test_training_from_data_alone_finds_a_one_step_sampler():
    model = trained(600)
    noise = torch.randn(1000, 2, dtype=torch.float64)
    data, _ = GAUSSIAN.sample(1000, Key(1))
    with torch.no_grad():
        once = sample_map(model, noise, [1.0, 0.0])
        euler_once = noise - model.field()(noise, 1.0)
    exact = flow(noise, torch.ones(1000).double(), torch.zeros(1000).double(), Straight())
    assert float((once - exact).norm()) < 0.3 * float((euler_once - exact).norm())
    # one Euler step of its own velocity averages the data away
    assert float(energy_distance(once, data)) < 0.2 * float(energy_distance(euler_once, data))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 4), st.booleans())
def test_any_shape_is_served(features, batch, double):
    data = torch.randn(batch, *features, dtype=torch.float64 if double else torch.float32)
    model = MeanFlow(lambda x, s, t: x * s.reshape(-1, *(1,) * (x.ndim - 1)).to(x), Straight())
    loss = mean_flow_loss(model, data, key=Key(0))
    assert loss.shape == (batch,)
    assert loss.dtype == data.dtype


MODEL = MeanFlow(lambda x, s, t: x, Straight())
ROWS = torch.zeros(3, 2)
HALF = torch.full((3,), 0.5)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"s": HALF}, "t"),
        ({"s": HALF, "t": HALF + 0.1}, "t"),
        ({"s": HALF[:2], "t": HALF}, "s"),
        ({"s": HALF + 1, "t": HALF}, "t"),
        ({"s": HALF, "t": HALF, "law": LogitNormal()}, "law"),
        ({"instantaneous": 1.5}, "instantaneous"),
        ({"power": -1.0}, "power"),
        ({"noise": ROWS[:2]}, "noise"),
        ({"data": torch.tensor(1.0)}, "data"),
        ({"teacher": Field(lambda x, t: x, Cosine())}, "teacher"),
    ],
    ids=["one", "order", "rows", "late", "both", "share", "power", "noise", "scalar", "path"],
)
def test_bad_calls_are_refused(change, argument):
    given = {"data": ROWS, **change}
    with pytest.raises(ArgumentError) as refusal:
        mean_flow_loss(MODEL, given.pop("data"), **given)
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    with pytest.raises(ArgumentTypeError, match="model"):
        mean_flow_loss(MODEL.field(), ROWS)
    with pytest.raises(ArgumentTypeError, match="teacher"):
        mean_flow_loss(MODEL, ROWS, teacher=lambda x, t: x)
    with pytest.raises(ArgumentTypeError, match="law"):
        mean_flow_loss(MODEL, ROWS, law="uniform")
    with pytest.raises(ArgumentTypeError, match="key"):
        mean_flow_loss(MODEL, ROWS, key=0)
