"""Rectified flow: the loss beside torchcfm's and flow_matching's, endpoints, gradients, variants."""

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    Cosine,
    EulerMaruyama,
    Field,
    Reflowed,
    Straight,
    UShaped,
    crossing,
    matching_loss,
    nearest_pairs_field,
    pseudo_huber,
    rectified_loss,
    sample,
)
from thalweg.ledger import saved_bytes
from thalweg.noise import Key, normal
from thalweg.problems import GaussianMixture

# on a grid of powers of two, 1 - t is exact and both directions of time hold the same numbers
T = torch.linspace(0, 1, 65)[:64]


class Small(nn.Module):
    def __init__(self, width=8, dtype=torch.float32):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).to(dtype)

    def forward(self, x, t):
        return self.inner(torch.cat([x, t[:, None].to(x)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_loss_equals_torchcfm_and_flow_matching_to_0_ulp(dtype):
    """torchcfm.ConditionalFlowMatcher(sigma=0): x_t = t x1 + (1 - t) x0, u_t = x1 - x0, with x1 the data.

    Formulas read in torchcfm 1.0 (conditional_flow_matching.py, MIT). flow_matching is run itself.
    """
    path = pytest.importorskip("flow_matching.path")
    torch.manual_seed(0)
    net = Small(dtype=dtype)
    data, source = torch.randn(2, 64, 2, dtype=dtype)
    t = T.to(dtype)
    between = t[:, None] * data + (1 - t[:, None]) * source
    their_loss = ((net(between, 1 - t) + (data - source)) ** 2).mean(1)
    field = Field(net, Straight(), coupled=True)
    ours = rectified_loss(field, data, source, t=1 - t)
    assert torch.equal(ours, their_loss)
    drawn = path.AffineProbPath(path.scheduler.CondOTScheduler()).sample(x_0=source, x_1=data, t=t)
    assert torch.equal(drawn.x_t, between)
    assert torch.equal(ours, ((net(drawn.x_t, 1 - t) + drawn.dx_t) ** 2).mean(1))
    # and the same gradients
    mine = torch.autograd.grad(ours.mean(), list(net.parameters()))
    theirs = torch.autograd.grad(their_loss.mean(), list(net.parameters()))
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)


def test_a_network_of_the_papers_direction_has_the_papers_loss():
    """Time from source to data and v = data - source: told so, not guessed."""
    net = Small()
    data, source = torch.randn(2, 64, 2)
    between = T[:, None] * data + (1 - T[:, None]) * source
    theirs = ((net(between, T) - (data - source)) ** 2).mean(1)
    told = Field(net, Straight(), direction="data_at_1", coupled=True)
    assert torch.equal(rectified_loss(told, data, source, t=1 - T), theirs)
    untold = Field(net, Straight(), coupled=True)
    assert not torch.allclose(rectified_loss(untold, data, source, t=1 - T), theirs)


def test_it_is_matching_loss_for_normal_noise():
    field = Field(Small(), Straight())
    data, noise = torch.randn(2, 16, 2)
    given = {"law": UShaped(), "stratified": True, "key": Key(1)}
    assert torch.equal(
        rectified_loss(field, data, noise, **given), matching_loss(field, data, noise=noise, **given)
    )


def test_endpoints_and_score_on_the_straight_path_are_those_of_the_mixture():
    """E[data | x] = x - t v, E[noise | x] = x + (1 - t) v, score = -(x + (1 - t) v) / t, for t from 0 to 1.

    In the paper's direction: E[X_0|x] = x - t v, E[X_1|x] = x + (1-t) v, score = (t v - x) / (1-t).
    """
    mixture = GaussianMixture.drawn(3, 2, seed=1)
    x = torch.randn(40, 2, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    v = mixture.field(Straight())(x, t)
    at, close = t[:, None], torch.testing.assert_close
    close(x - at * v, mixture.predict("data", x, t, Straight()), rtol=1e-10, atol=1e-12)
    close(x + (1 - at) * v, mixture.predict("noise", x, t, Straight()), rtol=1e-10, atol=1e-12)
    close(-(x + (1 - at) * v) / at, mixture.predict("score", x, t, Straight()), rtol=1e-9, atol=1e-10)
    paper_v, paper_t = -v, 1 - at
    close((paper_t * paper_v - x) / (1 - paper_t), mixture.predict("score", x, t, Straight()))
    close(mixture.field(Straight()).predict("score", x, t), mixture.predict("score", x, t, Straight()))


def test_the_score_of_the_velocity_is_exact_and_its_diffusion_keeps_the_law():
    """N(0, 1) to N(0, 1): at the paper's t = 0.7 the score at 1 is -1 / (0.7^2 + 0.3^2) = -1.72."""
    gaussian = GaussianMixture.isotropic([[0.0]], 1.0)
    field = gaussian.field(Straight())
    x = torch.ones(1, 1, dtype=torch.float64)
    found = field.predict("score", x, 0.3)
    torch.testing.assert_close(found, -x / (0.7**2 + 0.3**2))
    start = 0.98**2 + 0.02**2
    noise = torch.randn(20000, 1, dtype=torch.float64) * start**0.5
    times = torch.linspace(0.98, 0.0, 400, dtype=torch.float64)
    end = sample(field, noise, times, solver=EulerMaruyama(), key=Key(0))
    assert abs(float(end.mean())) < 5 / 20000**0.5
    assert abs(float(end.var()) - 1) < 5 * (2 / 20000) ** 0.5 + 0.01


def test_no_gradient_flows_through_targets_or_the_solver():
    net = Small(dtype=torch.float64)
    field = Field(net, Straight(), coupled=True)
    data, source = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = source - data
    found = net(Straight().noised(data, source, t), t)
    by_hand = torch.autograd.grad((found - wanted).square().mean(), list(net.parameters()))
    mine = torch.autograd.grad(
        rectified_loss(field, data, source, t=t).mean(), list(net.parameters()), retain_graph=False
    )
    for a, b in zip(mine, by_hand):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_memory_of_the_loss_does_not_depend_on_the_steps_of_the_simulation():
    net = Small(width=64)
    field = Field(net, Straight())

    def kept(steps):
        times = torch.linspace(1, 0, steps + 1)
        pairs = Reflowed(field, lambda n, key: normal(torch.empty(n, 2), key), times)

        def forward():
            data, source, _ = pairs.draw(32, Key(0))
            return rectified_loss(field, data, source).mean()

        return saved_bytes(forward, net)

    through = saved_bytes(lambda: sample(field, torch.randn(32, 2), torch.linspace(1, 0, 33)).sum(), net)
    assert kept(1) == kept(32) < through / 10


def test_a_feature_loss_sees_only_what_the_features_see():
    net = Small(dtype=torch.float64)
    field = Field(net, Straight(), coupled=True)
    data, source = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    error = field(Straight().noised(data, source, t), t) - (source - data)
    first = rectified_loss(field, data, source, t=t, features=lambda x: x[:, :1])
    torch.testing.assert_close(first, error[:, 0].square())
    same = rectified_loss(field, data, source, t=t, features=lambda x: x)
    torch.testing.assert_close(same, rectified_loss(field, data, source, t=t))
    x = Straight().noised(data, source, t)
    curved = rectified_loss(field, data, source, t=t, features=lambda x: torch.sin(x))
    torch.testing.assert_close(curved, (torch.cos(x) * error).square().mean(1))
    curved.mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_pseudo_huber_is_a_square_near_and_a_length_far():
    wanted = torch.zeros(1, 4, dtype=torch.float64)
    near = torch.full((1, 4), 1e-4, dtype=torch.float64)
    torch.testing.assert_close(
        pseudo_huber(near, wanted, c=1.0), near.square().sum(1) / 2, rtol=1e-6, atol=1e-16
    )
    far = torch.full((1, 4), 1e4, dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(far, wanted), far.norm(dim=1), rtol=1e-6, atol=0.0)
    c = 0.00054 * 4
    found = pseudo_huber(torch.ones(1, 4), torch.zeros(1, 4))
    torch.testing.assert_close(found, torch.tensor([(4 + c**2) ** 0.5 - c]))
    field = Field(Small(), Straight(), coupled=True)
    data, source = torch.randn(2, 5, 2)
    assert rectified_loss(field, data, source, distance=pseudo_huber).shape == (5,)


def test_the_general_path_regresses_on_its_own_slope():
    """Eq. 8: X_t = a_t X_1 + b_t X_0 with target a'_t X_1 + b'_t X_0, on the cosine path."""
    net = Small(dtype=torch.float64)
    data, source = torch.randn(2, 8, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    quarter = torch.pi / 2
    a, b = torch.cos(quarter * t)[:, None], torch.sin(quarter * t)[:, None]
    wanted = quarter * (-b * data + a * source)
    by_hand = (net(a * data + b * source, t) - wanted).square().mean(1)
    found = rectified_loss(Field(net, Cosine(), coupled=True), data, source, t=t)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)


def test_the_loss_compiles():
    net = Small()
    field = Field(net, Straight(), coupled=True)
    data, source = torch.randn(2, 8, 2)
    t = torch.linspace(0.1, 0.9, 8)

    def loss(data, source, t):
        return rectified_loss(field, data, source, t=t)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(data, source, t), loss(data, source, t))


FIELD = Field(lambda x, t: x, Straight(), coupled=True)
ROWS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: rectified_loss(FIELD, ROWS, ROWS[:2]), "source"),
        (lambda: rectified_loss(FIELD, ROWS, ROWS.double()), "source"),
        (lambda: rectified_loss(FIELD, ROWS, ROWS, t=torch.tensor([0.0, 0.5, 1.5])), "t"),
        (lambda: rectified_loss(FIELD, ROWS, ROWS, t=torch.zeros(2)), "t"),
        (lambda: rectified_loss(FIELD, ROWS, ROWS, distance=lambda a, b: (a - b).mean()), "distance"),
        (
            lambda: rectified_loss(FIELD, ROWS, ROWS, distance=pseudo_huber, features=lambda x: x),
            "features",
        ),
        (lambda: rectified_loss(Field(lambda x, t: x, Straight(), "noise"), ROWS, ROWS), "field"),
        (lambda: pseudo_huber(ROWS, ROWS, c=0.0), "c"),
        (lambda: crossing(FIELD, ROWS, ROWS, [0.5]), "times"),
    ],
    ids=["rows", "dtype", "late", "few", "distance", "both", "noise", "c", "grid"],
)
def test_bad_calls_are_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    with pytest.raises(ArgumentTypeError, match="field"):
        rectified_loss(lambda x, t: x, ROWS, ROWS)
    with pytest.raises(ArgumentTypeError, match="source"):
        rectified_loss(FIELD, ROWS, None)
    with pytest.raises(ArgumentTypeError, match="features"):
        rectified_loss(FIELD, ROWS, ROWS, features=3)
    with pytest.raises(ArgumentTypeError, match="pairs"):
        nearest_pairs_field((ROWS, ROWS))
