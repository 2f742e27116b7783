"""The asymmetry of Jacobians: exact on linear fields, 0 on gradients, unbiased by probes."""

import itertools
import sys

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from thalweg.flows import (
    Cosine,
    Field,
    Straight,
    VarianceExploding,
    asymmetry_penalty,
    gauged,
    jacobian,
    jacobian_asymmetry,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture

MIXTURE = GaussianMixture.drawn(3, 3, seed=1)
PATHS = {"cosine": Cosine(), "straight": Straight(), "ve": VarianceExploding(5.0)}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
methods = pytest.mark.parametrize("method", ["hutchinson", "two_probe"])


def matrix(d, seed=0):
    return torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(m):
    return lambda x, t: x @ m.mT


def noised(path, t, count=16):
    data, _ = MIXTURE.sample(count, Key(3))
    return path.noised(data, torch.randn_like(data), t)


class Net(nn.Module):
    def __init__(self, d=2, activation=nn.SiLU):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(d + 1, 8), activation(), nn.Linear(8, d)).double()

    def forward(self, x, t):
        return self.inner(torch.cat([x, t[:, None]], 1))


@every_path
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_exact_check_the_oracle_is_symmetric_to_round_off(path, t):
    torch.manual_seed(0)
    found = jacobian_asymmetry(MIXTURE.field(path, "score"), noised(path, t), t)
    assert float(found.ratio) < 1e-28
    assert bool((found.asymmetry.sqrt() < 1e-14 * found.square.sqrt() * 10).all())


@pytest.mark.parametrize("kind", ["data", "noise", "velocity", "v"])
def test_every_kind_of_the_oracle_is_a_gradient(kind):
    torch.manual_seed(0)
    found = jacobian_asymmetry(MIXTURE.field(Cosine()), noised(Cosine(), 0.4), 0.4, kind=kind)
    assert float(found.ratio) < 1e-26


@pytest.mark.parametrize("d", [2, 3, 4])
def test_exact_check_linear_field_has_the_share_of_its_antisymmetric_part(d):
    m = matrix(d)
    found = jacobian_asymmetry(linear(m), torch.randn(5, d, dtype=torch.float64), 0.5)
    skew = (m - m.mT) / 2
    torch.testing.assert_close(found.ratio, skew.square().sum() / m.square().sum(), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        found.asymmetry, (m.square().sum() - (m @ m).trace()).expand(5), rtol=1e-12, atol=1e-13
    )


def test_a_rotation_has_the_ratio_1_and_a_gradient_0():
    turn = matrix(4) - matrix(4).mT
    x = torch.randn(2, 4, dtype=torch.float64)
    assert float(jacobian_asymmetry(linear(turn), x, 0.5).ratio) == pytest.approx(1, rel=1e-13)
    assert float(jacobian_asymmetry(linear(turn @ turn), x, 0.5).ratio) < 1e-28


@pytest.mark.parametrize("d", [2, 3, 4])
@methods
def test_exact_check_estimators_are_unbiased_over_all_rademacher_vectors(monkeypatch, method, d):
    m = matrix(d)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    count = len(signs)
    if method == "two_probe":
        pairs = itertools.product(signs, signs)
        signs, count = torch.stack([sign for pair in pairs for sign in pair]), count**2
    module = sys.modules["thalweg.flows.jacobian_asymmetry"]
    monkeypatch.setattr(module, "rademacher", lambda like, key: signs[:, None])
    x = torch.randn(1, d, dtype=torch.float64)
    found = jacobian_asymmetry(linear(m), x, 0.5, method=method, probes=count)
    exact = jacobian_asymmetry(linear(m), x, 0.5)
    torch.testing.assert_close(found.asymmetry, exact.asymmetry, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.square, exact.square, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_exact_check_the_papers_product_form_has_the_same_mean_but_keeps_half_of_the_digits(d):
    """u . (u - q) for u = J^T v, q = J v; near symmetry its rounding is that of |J|^2, not of its square."""
    m = matrix(d)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    u, q = signs @ m, signs @ m.mT
    exact = (m - m.mT).square().sum() / 2
    torch.testing.assert_close((u * (u - q)).sum(1).mean(), exact, rtol=1e-13, atol=1e-13)
    near = (m + m.mT + 1e-6 * matrix(d, 1)).float()
    truth = float((near - near.mT).double().square().sum() / 2)
    u, q = signs.float() @ near, signs.float() @ near.mT
    product = abs(float((u * (u - q)).sum(1).mean()) - truth)
    difference = abs(float((u - q).square().sum(1).mean() / 2) - truth)
    assert difference < product


@methods
def test_probes_agree_with_the_whole_jacobian_within_their_error(method):
    path, d = Cosine(), 3
    turn = matrix(d) - matrix(d).mT
    field = gauged(MIXTURE.field(path, "noise"), turn, 0.5)
    torch.manual_seed(0)
    x = noised(path, 0.5, 200)
    exact = jacobian_asymmetry(field, x, 0.5)
    found = jacobian_asymmetry(field, x, 0.5, method=method, probes=32, key=Key(0))
    difference = found.asymmetry - exact.asymmetry
    error = float(difference.std()) / 200**0.5
    assert abs(float(difference.mean())) < 5 * error < 0.5 * float(exact.asymmetry.mean())


def test_a_symmetric_block_does_not_make_a_conservative_field():
    m = torch.eye(3, dtype=torch.float64)
    m[0, 2] = 1.0
    x = torch.randn(2, 3, dtype=torch.float64)
    assert float(jacobian_asymmetry(linear(m), x, 0.5, coordinates=[0, 1]).ratio) == 0
    assert float(jacobian_asymmetry(linear(m), x, 0.5, coordinates=[2, 0]).ratio) > 0.1
    assert float(jacobian_asymmetry(linear(m), x, 0.5).ratio) > 0.1


def test_blocks_are_those_of_the_whole_jacobian():
    torch.manual_seed(0)
    net, x = Net(4), torch.randn(3, 4, dtype=torch.float64)
    whole = jacobian(net, x, 0.5)
    torch.testing.assert_close(jacobian(net, x, 0.5, coordinates=[3, 1]), whole[:, [3, 1]][:, :, [3, 1]])
    torch.testing.assert_close(jacobian(net, x, 0.5, chunk=1), whole)
    expected = torch.autograd.functional.jacobian(
        lambda y: net(y[None], torch.tensor([0.5]).double())[0], x[1]
    )
    torch.testing.assert_close(whole[1], expected)


def test_a_constant_bias_has_no_asymmetry_and_a_fine_ripple_has_much():
    """Asymmetry measures the derivative of an error, not its size."""
    x = torch.randn(64, 2, dtype=torch.float64)

    def ripple(x, t):
        return -x + 1e-3 * torch.sin(1e3 * x.flip(1)) * torch.tensor([1.0, -1.0])

    assert float(jacobian_asymmetry(lambda x, t: -x + 5.0, x, 0.5).ratio) == 0
    assert float(jacobian_asymmetry(ripple, x, 0.5).ratio) > 0.1


def test_the_ratio_is_one_of_means():
    """One example whose Jacobian nearly vanishes does not decide it."""
    x = torch.tensor([[0.0, 0.0], [10.0, 10.0]], dtype=torch.float64)

    def field(x, t):
        size = x.square().sum(1, keepdim=True)
        return size * x + 1e-3 * (x.flip(1) * torch.tensor([1.0, -1.0]))

    found = jacobian_asymmetry(field, x, 0.5)
    ratios = found.asymmetry / (2 * found.square)
    assert float(ratios.mean()) > 0.4
    assert float(found.ratio) < 1e-8


def test_exact_check_the_penaltys_gradient_is_that_of_the_exact_asymmetry_in_two_dimensions(monkeypatch):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(6, 2, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    module = sys.modules["thalweg.flows.jacobian_asymmetry"]
    monkeypatch.setattr(module, "rademacher", lambda like, key: signs[:, None].expand(like.shape))
    penalty = asymmetry_penalty(net, x, 0.5, kind=None, probes=4).mean()
    parameters = list(net.parameters())
    found = torch.autograd.grad(penalty, parameters, allow_unused=True)
    rows = torch.stack([
        torch.autograd.functional.jacobian(
            lambda y: net(y[None], torch.full((1,), 0.5).double())[0], each, create_graph=True
        )
        for each in x
    ])  # fmt: skip
    exact = ((rows[:, 0, 1] - rows[:, 1, 0]) ** 2).mean()
    expected = torch.autograd.grad(exact, parameters, allow_unused=True)
    assert any(one is not None and float(one.norm()) > 1e-3 for one in expected)
    for one, other in zip(found, expected):
        if one is None or other is None:
            assert one is None or float(one.norm()) == 0
            assert other is None or float(other.norm()) == 0
        else:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_penalty_trains_a_field_towards_symmetry():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 2, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    before = float(jacobian_asymmetry(net, x, 0.5).asymmetry.mean().detach())
    for step in range(100):
        optimizer.zero_grad()
        asymmetry_penalty(net, x, 0.5, kind=None, key=Key(0, step=step)).mean().backward()
        optimizer.step()
    assert float(jacobian_asymmetry(net, x, 0.5).asymmetry.mean().detach()) < 1e-2 * before


def test_the_penalty_of_the_noise_is_that_of_the_score_by_the_square_of_sigma():
    torch.manual_seed(0)
    field, x = Field(Net(), Cosine(), "noise"), torch.randn(4, 2, dtype=torch.float64)
    sigma = Cosine().coefficients(0.3).sigma
    noise = asymmetry_penalty(field, x, 0.3, key=Key(1))
    score = asymmetry_penalty(field, x, 0.3, kind="score", key=Key(1))
    torch.testing.assert_close(noise, sigma**2 * score, rtol=1e-10, atol=0)


def test_the_penalty_refuses_a_field_that_differentiates_once():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

        def forward(self, x, t):
            # the slope is written in by hand, without a graph
            return x * self.weight.detach().sum() + (self.weight.sum() * 0)

    with pytest.raises(UnsupportedError, match="once, not twice"):
        asymmetry_penalty(Once(), torch.ones(3, 2, dtype=torch.float64), 0.5, kind=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["exact", "hutchinson", "two_probe"])
def test_dtypes(dtype, method):
    x = torch.randn(4, 3, dtype=dtype)
    found = jacobian_asymmetry(MIXTURE.field(Cosine(), "noise"), x, 0.5, method=method, key=Key(0))
    assert found.asymmetry.dtype == found.square.dtype == dtype


def test_images_and_conditions():
    def field(x, t, c):
        return x.flip(-1) * torch.arange(1.0, 5.0).reshape(1, 1, 2, 2) * c[:, None, None, None]

    x, c = torch.randn(3, 1, 2, 2), torch.tensor([1.0, 2.0, 3.0])
    found = jacobian_asymmetry(field, x, 0.5, conditions={"c": c})
    torch.testing.assert_close(found.asymmetry, c**2 * 2)
    probed = jacobian_asymmetry(field, x, 0.5, conditions={"c": c}, method="hutchinson", probes=4)
    assert probed.asymmetry.shape == (3,)


def test_composes_with_compile_and_vmap():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 2, dtype=torch.float64)
    expected = jacobian_asymmetry(net, x, 0.5)
    compiled = torch.compile(lambda x: jacobian(net, x, 0.5), backend="aot_eager")(x)
    torch.testing.assert_close(compiled, jacobian(net, x, 0.5))
    mapped = torch.vmap(lambda one: jacobian(net, one[None], 0.5)[0])(x)
    torch.testing.assert_close(mapped, jacobian(net, x, 0.5))
    pushed = torch.func.jvp(lambda x: jacobian_asymmetry(net, x, 0.5).asymmetry, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(pushed[0], expected.asymmetry)


def test_a_network_with_fused_attention_has_products():
    def field(x, t):
        heads = x.reshape(len(x), 1, 3, 4)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).reshape(x.shape)

    x = torch.randn(2, 12)
    exact = jacobian_asymmetry(field, x, 0.5)
    assert float(exact.ratio) > 1e-4
    assert bool(torch.isfinite(jacobian_asymmetry(field, x, 0.5, method="hutchinson").asymmetry).all())


def test_batch_statistics_are_refused_and_running_ones_are_not():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    x = torch.randn(4, 2)
    with pytest.raises(ArgumentError, match=r"batch statistics in net\.1.*eval"):
        jacobian_asymmetry(Normed(), x, 0.5)
    assert jacobian(Normed().eval(), x, 0.5).shape == (4, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"field": 3}, ArgumentTypeError),
        ({"field": nn.Linear}, ArgumentTypeError),
        ({"kind": "noise"}, ArgumentError),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, ArgumentTypeError),
        ({"x": torch.ones(3, 2, dtype=torch.complex64)}, ArgumentTypeError),
        ({"x": torch.ones(3)}, ArgumentError),
        ({"x": torch.ones(0, 2)}, ArgumentError),
        ({"t": torch.ones(2)}, ArgumentError),
        ({"method": "full"}, ArgumentError),
        ({"method": "hutchinson", "probes": 0}, ArgumentError),
        ({"method": "hutchinson", "probes": 1.0}, ArgumentTypeError),
        ({"method": "hutchinson", "coordinates": [0, 1]}, ArgumentError),
        ({"coordinates": [0, 2]}, ArgumentError),
        ({"coordinates": [0]}, ArgumentError),
        ({"coordinates": [0, 0]}, ArgumentError),
        ({"coordinates": [0, 1.0]}, ArgumentTypeError),
        ({"coordinates": 1}, ArgumentTypeError),
        ({"field": lambda x, t: x[:, :1]}, ArgumentError),
    ],
    ids=lambda value: None if isinstance(value, type) else next(iter(value)),
)
def test_bad_input_is_refused(arguments, error):
    given = {"field": lambda x, t: x, "x": torch.ones(3, 2), "t": 0.5, **arguments}
    with pytest.raises(error):
        jacobian_asymmetry(given.pop("field"), given.pop("x"), given.pop("t"), **given)


def test_a_coupled_field_has_no_score_and_a_velocity():
    field = Field(lambda x, t: x.flip(1), Straight(), coupled=True)
    with pytest.raises(ArgumentError, match="coupled"):
        jacobian_asymmetry(field, torch.ones(2, 2), 0.5)
    assert float(jacobian_asymmetry(field, torch.ones(2, 2), 0.5, kind="velocity").ratio) == 0
