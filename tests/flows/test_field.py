"""A field: conversions of predictions, other paths, what the network is told, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    DDIM,
    KINDS,
    Cosine,
    EulerMaruyama,
    Field,
    Rescaled,
    Retimed,
    Straight,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    autoguidance,
    classifier_free,
    classifier_guidance,
    edm_preconditioned,
    sample,
    shifted_clock,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture

PATHS = {
    "straight": Straight(),
    "cosine": Cosine(),
    "variance_preserving": VariancePreserving(),
    "sub_variance_preserving": SubVariancePreserving(),
    "variance_exploding": VarianceExploding(5.0),
    "retimed": Retimed(Straight(), shifted_clock(3.0)),
}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
MIXTURE = GaussianMixture.drawn(3, 2, seed=1)


def points(path, count=30):
    data, _ = MIXTURE.sample(count, Key(0))
    t = torch.linspace(0.05, 0.95, count, dtype=torch.float64)
    return path.noised(data, torch.randn_like(data), t), t


@every_path
def test_conversions_between_all_kinds_agree_with_the_oracle(path):
    x, t = points(path)
    for source, target in itertools.product(KINDS, KINDS):
        found = MIXTURE.field(path, source).predict(target, x, t)
        torch.testing.assert_close(found, MIXTURE.predict(target, x, t, path), rtol=1e-9, atol=1e-9)


@every_path
def test_round_trips_are_exact(path):
    """From any kind to any other and back, on outputs that no model of data would give."""
    x, t = points(path)
    output = torch.randn_like(x)
    for source, target in itertools.permutations(KINDS, 2):
        field = Field(lambda x, t: output, path, source)
        back = field.converted(target).converted(source)
        assert (back(x, t) - output).abs().max() < 1e-10, (source, target)


def test_velocity_is_v_on_the_cosine_path_and_noise_less_data_on_the_straight_one():
    x, t = points(Cosine())
    torch.testing.assert_close(
        MIXTURE.predict("velocity", x, t, Cosine()), torch.pi / 2 * MIXTURE.predict("v", x, t, Cosine())
    )
    noise, data = (MIXTURE.predict(kind, x, t, Straight()) for kind in ("noise", "data"))
    torch.testing.assert_close(MIXTURE.predict("velocity", x, t, Straight()), noise - data)


@pytest.mark.parametrize(
    ("source", "target", "t"),
    [("noise", "data", 1.0), ("data", "noise", 0.0), ("data", "velocity", 0.0), ("noise", "score", 0.0)],
)
def test_singular_ends_are_refused(source, target, t):
    field = Field(lambda x, t: x, Straight(), source)
    with pytest.raises(ArgumentError, match="stop a little before") as refusal:
        field.predict(target, torch.ones(2, 2), t)
    assert refusal.value.argument == "t"


@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
@pytest.mark.parametrize("source", ["velocity", "v"])
def test_velocity_and_v_reach_data_and_noise_at_both_ends(path, source):
    x = torch.randn(4, 2, dtype=torch.float64)
    for t, target in itertools.product((0.0, 1.0), ("data", "noise", "velocity", "v")):
        found = MIXTURE.field(path, source).predict(target, x, t)
        torch.testing.assert_close(found, MIXTURE.predict(target, x, t, path), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_on_another_path_is_the_exact_field_there(kind):
    """Same signal-to-noise ratio, another factor and another time: u_B = (c'/c) x + c t' u_A(x / c, t)."""
    for old, new in itertools.permutations(PATHS.values(), 2):
        x, t = points(new, 12)
        moved = MIXTURE.field(old, kind).on(new)
        reached = old.time_at(new.half_log_snr(t))
        # a path that ends before there is only noise knows nothing beyond
        inside = (reached > 0.001) & (reached < 0.999)
        assert inside.sum() > 5
        exact = MIXTURE.predict(kind, x, t, new)
        torch.testing.assert_close(moved(x, t)[inside], exact[inside], rtol=1e-8, atol=1e-8)


def test_velocity_on_another_path_follows_the_chain_rule():
    old, new = Cosine(), Rescaled(Straight(), lambda t: 1 + t)
    x, r = torch.randn(5, 3, dtype=torch.float64), 0.3 + 0.1 * torch.arange(5, dtype=torch.float64)

    def network(x, t):
        return torch.sin(x) * t[:, None]

    def clock(r):
        return old.time_at(new.half_log_snr(r))

    def scale(r):
        return new.coefficients(r).sigma / old.coefficients(clock(r)).sigma

    (t, t_rate), (c, c_rate) = (torch.func.jvp(f, (r,), (torch.ones_like(r),)) for f in (clock, scale))
    expected = (c_rate / c)[:, None] * x + (c * t_rate)[:, None] * network(x / c[:, None], t)
    found = Field(network, old, "velocity").on(new)(x, r)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_moving_to_ends_stays_finite():
    for kind in ("data", "noise"):
        moved = MIXTURE.field(Cosine(), kind).on(Straight())
        for t in (0.0, 1.0):
            assert torch.isfinite(moved(torch.randn(3, 2), t)).all()


def test_a_network_that_counts_from_noise_to_data_is_told_so():
    told = []

    def network(x, t):
        told.append(t)
        return -MIXTURE.predict("velocity", x, 1 - t, Straight())

    field = Field(network, Straight(), "velocity", direction="data_at_1")
    x, t = points(Straight())
    torch.testing.assert_close(field(x, t), MIXTURE.predict("velocity", x, t, Straight()))
    torch.testing.assert_close(told[0], 1 - t)
    torch.testing.assert_close(field.predict("score", x, t), MIXTURE.predict("score", x, t, Straight()))


def test_only_a_velocity_changes_sign_with_the_direction():
    x = torch.ones(2, 3)
    for kind in KINDS:
        field = Field(lambda x, t: x, Straight(), kind, direction="data_at_1")
        assert field(x, 0.5).sum() == (-6 if kind == "velocity" else 6)


def test_the_clock_is_what_the_network_hears_and_conditions_reach_it():
    heard = {}

    def network(x, t, **conditions):
        heard.update(conditions, t=t)
        return x

    field = Field(network, Straight(), "noise", clock=lambda t: 999 * t)
    field.converted("score").on(Cosine())(torch.ones(2, 1), 0.5, label=3)
    assert heard["label"] == 3
    torch.testing.assert_close(heard["t"], torch.full((2,), 999 * 0.5))


def test_parameters_of_derived_fields_are_those_of_the_network():
    net = nn.Linear(2, 2)

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t):
            return self.inner(x)

    field = Field(Timed(), Straight(), "noise").converted("v").on(Cosine())
    assert {id(p) for p in field.network.parameters()} == {id(p) for p in net.parameters()}
    field(torch.ones(3, 2), 0.5).sum().backward()
    assert net.weight.grad is not None


def test_edm_preconditioning_is_exact_for_gaussian_data_and_a_silent_network():
    """Data of variance sigma_data^2 around 0: c_skip x is the mean of the data given x."""
    gaussian = GaussianMixture.isotropic([[0.0, 0.0]], 0.5)
    path = VarianceExploding(80.0)
    field = Field(
        edm_preconditioned(lambda x, c: torch.zeros_like(x), 0.5), path, "data", clock=lambda t: 80 * t
    )
    x, t = torch.randn(20, 2, dtype=torch.float64), torch.linspace(0.01, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(field(x, t), gaussian.predict("data", x, t, path))
    assert isinstance(edm_preconditioned(nn.Linear(1, 1)), nn.Module)


def test_edm_preconditioning_gives_outputs_of_unit_variance_to_learn():
    """The target (data - c_skip x) / c_out and the input c_in x have variance 1 at every level."""
    data = torch.randn(200_000, 1, dtype=torch.float64) * 0.5
    noise = torch.randn_like(data)
    for sigma in (0.1, 1.0, 10.0):
        levels = torch.full((len(data),), sigma, dtype=torch.float64)
        seen = []
        x = data + sigma * noise
        zero = edm_preconditioned(lambda x, c: seen.append(x) or torch.zeros_like(x))(x, levels)  # noqa: B023
        one = edm_preconditioned(lambda x, c: torch.ones_like(x))(x, levels)
        target = (data - zero) / (one - zero)
        for value in (seen[0], target):
            assert abs(float(value.var()) - 1) < 5 * (2 / len(data)) ** 0.5


def test_forward_and_reverse_derivatives_and_vmap_pass_through():
    field = MIXTURE.field(Cosine(), "noise").converted("velocity")
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(field, (x, t))
    value, along = torch.func.jvp(
        lambda x, t: field(x, t), (x.detach(), t.detach()), (torch.ones_like(x), torch.ones_like(t))
    )
    h = 1e-6
    with torch.no_grad():
        slope = (field(x + h, t + h) - field(x - h, t - h)) / (2 * h)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-6)
    single = torch.func.vmap(lambda x, t: field(x[None], t[None])[0])(x.detach(), t.detach())
    torch.testing.assert_close(single, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_state_keeps_its_dtype(dtype):
    field = Field(lambda x, t: x * t[:, None], Straight(), "noise")
    x = torch.randn(3, 2).to(dtype)
    for t in (0.5, torch.tensor(0.5), torch.full((3,), 0.5, dtype=torch.float64)):
        assert field.predict("data", x, t).dtype == dtype
        assert field.on(VariancePreserving())(x, t).dtype == dtype


def test_a_conversion_compiles():
    field = Field(lambda x, t: torch.sin(x), Straight(), "noise")
    x, t = torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.7])
    compiled = torch.compile(lambda x, t: field.predict("velocity", x, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), field.predict("velocity", x, t))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_any_shape_of_state_is_served(shape, source, target):
    x = torch.ones(shape)
    field = Field(lambda x, t: x, Cosine(), source)
    t = torch.full((shape[0],), 0.5)
    torch.testing.assert_close(field.predict(target, x, t), field.predict(target, x, 0.5))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda f: Field(f, Straight(), "epsilon"), "predicts"),
        (lambda f: Field(f, Straight(), "clean"), "predicts"),
        (lambda f: Field(f, Straight(), direction="noise_first"), "direction"),
        (lambda f: Field(f, Straight(), "noise").predict("x0", torch.ones(1, 1), 0.5), "kind"),
        (lambda f: Field(f, Straight(), "noise")(torch.ones(2, 1), 1.5), "t"),
        (lambda f: Field(f, Straight(), "noise")(torch.ones(2, 1), torch.ones(3)), "t"),
        (lambda f: Field(f, Straight(), "noise")(torch.tensor(1.0), 0.5), "x"),
        (lambda f: Field(lambda x, t: x[:1], Straight(), "noise")(torch.ones(2, 1), 0.5), "network"),
    ],
    ids=["kind", "clean", "direction", "target", "late", "times", "scalar", "shape"],
)
def test_what_makes_no_field_is_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make(lambda x, t: x)
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    with pytest.raises(ArgumentTypeError, match=r"Straight\(\)"):
        Field(lambda x, t: x, Straight)
    with pytest.raises(ArgumentTypeError, match="network"):
        Field(nn.Linear, Straight())
    with pytest.raises(ArgumentTypeError, match="x: "):
        Field(lambda x, t: x, Straight())(torch.ones(2, 1, dtype=torch.long), 0.5)


def test_a_coupled_field_has_no_score_and_takes_no_fresh_noise():
    """After reflow the velocity no longer yields the score: every way to it raises."""
    coupled = Field(lambda x, t: -x, Straight(), "velocity", coupled=True)
    x, times = torch.ones(2, 2), [0.9, 0.5]
    ways = {
        "predict": lambda: coupled.predict("score", x, 0.5),
        "converted": lambda: coupled.converted("score"),
        "noise": lambda: coupled.converted("noise").predict("score", x, 0.5),
        "moved": lambda: coupled.on(Cosine()).predict("score", x, 0.5),
        "guided": lambda: classifier_free(coupled, 2.0, null={}).predict("score", x, 0.5),
        "weaker": lambda: autoguidance(coupled, coupled, 2.0).predict("score", x, 0.5),
        "classifier": lambda: classifier_guidance(coupled, lambda x, t: -x.square().sum(1), 1.0),
        "declared": lambda: Field(lambda x, t: x, Straight(), "score", coupled=True),
        "ancestral": lambda: sample(coupled, x, times, solver=DDIM(eta=1.0)),
        "diffusion": lambda: sample(coupled, x, times, solver=EulerMaruyama()),
    }
    for way in ways.values():
        with pytest.raises(ArgumentError, match="noise"):
            way()
    free = Field(lambda x, t: -x, Straight(), "velocity")
    for kind in ("data", "noise", "v", "velocity"):
        torch.testing.assert_close(coupled.predict(kind, x, 0.5), free.predict(kind, x, 0.5))
    torch.testing.assert_close(sample(coupled, x, times), sample(free, x, times))
