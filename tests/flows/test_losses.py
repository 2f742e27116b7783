"""Losses, weights and laws of times: equalities between predictions, densities, keys."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    KINDS,
    WEIGHTS,
    Cosine,
    Field,
    LogitNormal,
    LogNormalLevel,
    Straight,
    SubVariancePreserving,
    UniformLevel,
    UniformTime,
    UShaped,
    VarianceExploding,
    VariancePreserving,
    data_weight,
    effective_weight,
    matching_loss,
    noised_batch,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture

PATHS = {
    "straight": Straight(),
    "cosine": Cosine(),
    "variance_preserving": VariancePreserving(),
    "sub_variance_preserving": SubVariancePreserving(),
    "variance_exploding": VarianceExploding(5.0),
}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
LAWS = {
    "uniform": UniformTime(0.1, 0.9),
    "logit_normal": LogitNormal(0.2, 0.8),
    "u_shaped": UShaped(),
    "log_normal_level": LogNormalLevel(),
    "uniform_level": UniformLevel(-2.0, 1.0),
}
T = torch.linspace(0.03, 0.97, 40, dtype=torch.float64)


def one_model_in_every_prediction(path):
    """The same model of the data, said in all kinds: a fixed nonlinear function with wrong answers."""

    def data(x, t):
        return torch.sin(3 * x) + t[:, None]

    model = Field(data, path, "data")
    return {kind: model.converted(kind) for kind in KINDS}


@every_path
def test_ratios_of_the_five_losses_are_the_weights(path):
    """Per sample: |Delta_E|^2 = (a/s)^2 |Delta_D|^2, |Delta_S|^2 = |Delta_E|^2 / s^2, and so on."""
    fields = one_model_in_every_prediction(path)
    x, noise = torch.randn(2, 40, 3, dtype=torch.float64)
    loss = {kind: matching_loss(field, x, t=T, noise=noise) for kind, field in fields.items()}
    a, s = path.coefficients(T)[:2]
    rate = path.half_log_snr_rate(T)
    close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)
    close(loss["noise"], (a / s) ** 2 * loss["data"])
    close(loss["score"], loss["noise"] / s**2)
    close(loss["velocity"], (a * rate) ** 2 * loss["data"])
    close(loss["velocity"], (s * rate) ** 2 * loss["noise"])
    close(loss["v"], ((a**2 + s**2) / s) ** 2 * loss["data"])
    if path in (Cosine(), VariancePreserving()):
        close(loss["v"], loss["data"] / s**2)
        close(loss["v"], ((a / s) ** 2 + 1) * loss["data"])


@every_path
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_means_the_same_whatever_the_network_predicts(path, weight):
    fields = one_model_in_every_prediction(path)
    x, noise = torch.randn(2, 40, 3, dtype=torch.float64)
    losses = [matching_loss(field, x, t=T, noise=noise, weight=weight) for field in fields.values()]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-12)
    expected = data_weight(weight, path, T) * matching_loss(fields["data"], x, t=T, noise=noise)
    torch.testing.assert_close(losses[0], expected)


@every_path
def test_the_bound_is_half_g_squared_times_the_score_and_flow_matching_in_disguise(path):
    """(g^2 / 2) |Delta_S|^2 = -lambda' |Delta_E|^2, and velocity weight = ELBO weight x (-s^2 lambda')."""
    elbo = data_weight("elbo", path, T)
    torch.testing.assert_close(elbo, path.squared_diffusion(T) / 2 * data_weight("score", path, T))
    rate, sigma = path.half_log_snr_rate(T), path.coefficients(T).sigma
    torch.testing.assert_close(data_weight("velocity", path, T), elbo * -(sigma**2) * rate)


def test_named_weights_are_their_formulas():
    path = VarianceExploding(5.0)
    sigma = 5 * T
    edm = (sigma**2 + 0.5**2) / (0.5 * sigma) ** 2
    torch.testing.assert_close(data_weight("edm", path, T), edm)
    snr = 1 / sigma**2
    torch.testing.assert_close(data_weight("min_snr", path, T), snr.clamp(max=5))
    torch.testing.assert_close(data_weight("min_snr", path, T, clip=2.0), snr.clamp(max=2))
    torch.testing.assert_close(data_weight("truncated", path, T), snr.clamp(min=1))
    torch.testing.assert_close(data_weight("sigmoid", path, T, bias=1.0), snr * torch.sigmoid(1 - snr.log()))
    assert (data_weight("data", path, T) == 1).all()


@every_path
def test_the_bound_does_not_depend_on_the_law_of_times(path):
    """Uniform in t, or uniform in lambda with the Jacobian: the same effective weight, up to its range."""
    top, bottom = (float(path.half_log_snr(t)) for t in (0.05, 0.95))
    inside = T[(T > 0.06) & (T < 0.94)]
    by_time = effective_weight("elbo", UniformTime(0.05, 0.95), path, inside) * 0.9

    def without_rate(path, t):
        return data_weight("noise", path, t)

    by_level = effective_weight(without_rate, UniformLevel(bottom, top), path, inside) * (top - bottom)
    torch.testing.assert_close(by_time, by_level)
    torch.testing.assert_close(by_time, data_weight("noise", path, inside))


def test_the_bound_estimated_under_two_laws_agrees():
    """The importance-sampled losses have one mean: within five standard errors."""
    path, field = Straight(), one_model_in_every_prediction(Straight())["noise"]
    data = torch.randn(200_000, 1, dtype=torch.float64)
    top, bottom = (float(path.half_log_snr(t)) for t in (0.3, 0.9))
    first = 0.6 * matching_loss(field, data, weight="elbo", law=UniformTime(0.3, 0.9), key=Key(0))
    second = (top - bottom) * matching_loss(
        field, data, weight="noise", law=UniformLevel(bottom, top), key=Key(1)
    )
    error = (first.var() / len(data) + second.var() / len(data)).sqrt()
    assert error < 0.02 * first.mean()
    assert abs(first.mean() - second.mean()) < 5 * error


@pytest.mark.parametrize("kind", KINDS)
def test_the_conditional_trick_the_exact_field_is_stationary(kind):
    """Regression on x0, e or their sum has the exact field as its minimum: gradients vanish in the mean."""
    mixture, path = GaussianMixture.drawn(2, 2, seed=1), Cosine()
    data, _ = mixture.sample(100_000, Key(0))
    batch = noised_batch(mixture.field(path, kind), data, law=UniformTime(0.2, 0.9), key=Key(1))
    exact = mixture.predict(kind, batch.x, batch.t, path)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    field = Field(lambda x, t: exact + shift * torch.sin(x), path, kind)
    losses = matching_loss(field, data, t=batch.t, noise=batch.noise)
    (gradient,) = torch.autograd.grad(losses.mean(), shift)
    pulls = 2 * (exact - mixture_target(field, batch)) * torch.sin(batch.x) / 2
    assert (gradient.abs() < 5 * pulls.std(0) / len(data) ** 0.5).all()
    # and what is not the mean is not stationary
    off = Field(lambda x, t: exact + 0.5 * torch.sin(x) + shift * torch.sin(x), path, kind)
    (away,) = torch.autograd.grad(matching_loss(off, data, t=batch.t, noise=batch.noise).mean(), shift)
    assert (away.abs() > 5 * pulls.std(0) / len(data) ** 0.5).all()


def mixture_target(field, batch):
    from thalweg.flows.losses import target

    return target(field, field.predicts, batch)


@pytest.mark.parametrize("law", list(LAWS.values()), ids=list(LAWS))
@pytest.mark.parametrize("path", [Cosine(), Straight()], ids=["cosine", "straight"])
def test_densities_are_those_of_the_draws(law, path):
    """The density of t is one over the slope of the quantile function, and integrates to one."""
    u = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    h = 1e-6
    slope = (law.times(u + h, path) - law.times(u - h, path)) / (2 * h)
    found = law.log_density(law.times(u, path), path)
    torch.testing.assert_close(found, -slope.log(), rtol=1e-5, atol=1e-5)
    ends = law.times(torch.tensor([0.0, 1 - 1e-9], dtype=torch.float64), path)
    assert ((ends >= 0) & (ends <= 1)).all()
    t = torch.linspace(1e-5, 1 - 1e-5, 200_001, dtype=torch.float64)
    total = torch.trapezoid(law.log_density(t, path).exp(), t)
    # a path that ends in pure noise has all levels; mass beyond the grid is what is missing
    assert abs(float(total) - 1) < 1e-3


def test_levels_of_edm_are_log_normal():
    path = VarianceExploding(80.0)
    u = torch.rand(100_000, dtype=torch.float64)
    level = (80 * LogNormalLevel().times(u, path)).log()
    assert abs(float(level.mean()) + 1.2) < 5 * 1.2 / len(u) ** 0.5
    assert abs(float(level.std()) - 1.2) < 5 * 1.2 / (2 * len(u)) ** 0.5


def test_strata_are_each_drawn_once_and_keep_the_law():
    field = Field(lambda x, t: x, Straight())
    for seed in range(20):
        t = noised_batch(field, torch.zeros(16, 1), stratified=True, key=Key(seed)).t
        assert sorted((t * 16).floor().tolist()) == list(range(16))
    first = torch.stack(
        [noised_batch(field, torch.zeros(4, 1), stratified=True, key=Key(seed)).t[0] for seed in range(4000)]
    )
    assert abs(float(first.mean()) - 0.5) < 5 / (12 * 4000) ** 0.5


def test_draws_come_from_the_key_or_from_torch():
    field, data = Field(lambda x, t: x, Straight()), torch.randn(8, 2)
    assert torch.equal(matching_loss(field, data, key=Key(1)), matching_loss(field, data, key=Key(1)))
    assert not torch.equal(matching_loss(field, data, key=Key(1)), matching_loss(field, data, key=Key(2)))
    batch = noised_batch(field, data, key=Key(1))
    other = noised_batch(field, data, key=Key(1, call=1))
    assert not torch.equal(batch.noise, other.noise)
    torch.manual_seed(0)
    first = matching_loss(field, data)
    torch.manual_seed(0)
    assert torch.equal(first, matching_loss(field, data))
    assert not torch.equal(first, matching_loss(field, data))


def test_targets_carry_no_gradient_and_losses_are_per_example():
    net = nn.Linear(2, 2)
    data = torch.randn(8, 2, requires_grad=True)
    losses = matching_loss(Field(lambda x, t: net(x.detach()), Cosine(), "v"), data, key=Key(0))
    assert losses.shape == (8,)
    losses.mean().backward()
    assert data.grad is None
    assert net.weight.grad is not None


def test_flow_matching_on_the_straight_path_is_the_textbook_line():
    """mean |(X_1 - X_0) - v(X_t, t)|^2 of rectified flow, in its own direction of time, to the last bit."""
    net = nn.Linear(3, 2).double()
    x0, x1 = torch.randn(2, 16, 2, dtype=torch.float64)
    t = torch.rand(16, dtype=torch.float64)

    def velocity(x, t):
        return net(torch.cat([x, t[:, None]], 1))

    # here data is X_1 at their t = 1
    mine = matching_loss(
        Field(velocity, Straight(), "velocity", direction="data_at_1"), x1, t=1 - t, noise=x0
    ).mean()
    ours = 1 - t
    told = (1 - ours)[:, None]
    theirs = ((x1 - x0) - velocity((1 - ours)[:, None] * x1 + ours[:, None] * x0, told[:, 0])).square().mean()
    torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)


def test_shapes_beyond_vectors_and_half_precision():
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((4,), (4, 1, 3, 3))):
        data = torch.randn(shape).to(dtype)
        for weight in (None, "elbo", "min_snr"):
            losses = matching_loss(
                Field(lambda x, t: x, Cosine(), "noise"), data, weight=weight, law=UniformTime(0.1, 0.9)
            )
            assert losses.shape == (4,)
            assert torch.isfinite(losses).all()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"weight": "snr"}, "weight"),
        ({"t": torch.rand(3)}, "t"),
        ({"t": torch.full((8,), 2.0)}, "t"),
        ({"t": torch.rand(8), "law": UniformTime()}, "law"),
        ({"noise": torch.randn(8, 3)}, "noise"),
        ({"data": torch.zeros(0, 2)}, "data"),
    ],
    ids=["weight", "times", "late", "both", "noise", "empty"],
)
def test_bad_calls_are_refused(change, argument):
    given = {"data": torch.randn(8, 2), **change}
    with pytest.raises(ArgumentError) as refusal:
        matching_loss(Field(lambda x, t: x, Straight()), given.pop("data"), **given)
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    field = Field(lambda x, t: x, Straight())
    with pytest.raises(ArgumentTypeError, match="law"):
        matching_loss(field, torch.randn(2, 2), law=UniformTime)
    with pytest.raises(ArgumentTypeError, match="field"):
        matching_loss(lambda x, t: x, torch.randn(2, 2))
    with pytest.raises(ArgumentTypeError, match="data"):
        matching_loss(field, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ArgumentError):
        UniformTime(0.5, 0.5)
    with pytest.raises(ArgumentError):
        LogitNormal(0.0, 0.0)
    with pytest.raises(ArgumentError):
        UniformLevel(1.0, -1.0)
