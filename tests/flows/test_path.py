"""Noising paths: rates, inverses, singular ends, and what cannot be a path."""

import math

import pytest
import torch

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    Cosine,
    Custom,
    GeometricVarianceExploding,
    OffsetCosine,
    Rescaled,
    Retimed,
    Straight,
    SubVariancePreserving,
    Tabulated,
    VarianceExploding,
    VariancePreserving,
    shifted_clock,
)

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
PATHS = {
    "straight": Straight(),
    "cosine": Cosine(),
    "offset_cosine": OffsetCosine(),
    "variance_preserving": VariancePreserving(),
    "sub_variance_preserving": SubVariancePreserving(),
    "variance_exploding": VarianceExploding(80.0),
    "geometric": GeometricVarianceExploding(),
    "tabulated": Tabulated(TABLE),
    "custom": Custom(lambda t: 1 - t**2, lambda t: t),
    "retimed": Retimed(Straight(), shifted_clock(3.0)),
    "rescaled": Rescaled(Cosine(), lambda t: 2 + t),
}
# inside, and away from the knots of the table
INSIDE = torch.linspace(0.0207, 0.9803, 37, dtype=torch.float64)
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))


@every_path
def test_rates_are_the_derivatives(path):
    h = 1e-6
    found, before, after = (path.coefficients(t) for t in (INSIDE, INSIDE - h, INSIDE + h))
    for value, rate in ((0, 2), (1, 3)):
        slope = (after[value] - before[value]) / (2 * h)
        torch.testing.assert_close(found[rate], slope, rtol=1e-6, atol=1e-6)
    slope = (path.half_log_snr(INSIDE + h) - path.half_log_snr(INSIDE - h)) / (2 * h)
    torch.testing.assert_close(path.half_log_snr_rate(INSIDE), slope, rtol=1e-5, atol=1e-6)
    assert (path.half_log_snr_rate(INSIDE) < 0).all()


@every_path
def test_the_ratio_and_its_inverse_agree(path):
    ratio = path.half_log_snr(INSIDE)
    found = path.coefficients(INSIDE)
    torch.testing.assert_close(ratio, (found.alpha / found.sigma).log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.time_at(ratio), INSIDE, rtol=1e-9, atol=1e-12)
    assert path.time_at(math.inf) == 0
    assert path.time_at(-math.inf) == 1


@every_path
def test_the_diffusion_has_the_marginals_of_the_path(path):
    """f and g from their definitions: variance' = 2 f variance + g^2, and g^2 = -2 sigma^2 lambda'."""
    found = path.coefficients(INSIDE)
    square = path.squared_diffusion(INSIDE)
    variance_rate = 2 * found.sigma * found.sigma_rate
    torch.testing.assert_close(2 * path.drift(INSIDE) * found.sigma**2 + square, variance_rate)
    torch.testing.assert_close(square, -2 * found.sigma**2 * path.half_log_snr_rate(INSIDE))
    assert (square > 0).all()


@pytest.mark.parametrize("name", ["cosine", "offset_cosine", "variance_preserving", "tabulated"])
def test_variance_is_preserved(name):
    found = PATHS[name].coefficients(INSIDE)
    torch.testing.assert_close(found.alpha**2 + found.sigma**2, torch.ones_like(INSIDE))


def test_ends_are_exact():
    for name in ("straight", "cosine", "custom", "retimed"):
        found = PATHS[name].coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert found.alpha.tolist() == [1.0, 0.0], name
        assert found.sigma.tolist() == [0.0, 1.0], name
    start = PATHS["tabulated"].coefficients(0.0)
    assert (float(start.alpha), float(start.sigma)) == (1.0, 0.0)
    assert all(math.isfinite(value) for value in start)
    near = PATHS["tabulated"].coefficients(1e-7)
    torch.testing.assert_close(start.sigma_rate, near.sigma / 1e-7, rtol=1e-6, atol=0)


def test_a_table_holds_its_entries():
    found = PATHS["tabulated"].coefficients(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(found.alpha**2, TABLE, rtol=1e-11, atol=0)


def test_offset_cosine_is_the_formula_of_the_paper():
    t, offset = INSIDE, 0.008
    squared = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    start = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    torch.testing.assert_close(OffsetCosine().coefficients(t).alpha ** 2, squared / start)


def test_noised_and_velocity_are_a_line_and_its_slope():
    data, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    found, slope = torch.func.jvp(lambda t: Cosine().noised(data, noise, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, Cosine().velocity(data, noise, t))
    assert found.shape == data.shape
    torch.testing.assert_close(Cosine().noised(data, noise, float(t[0]))[0], found[0])


def test_a_constant_share_has_rate_zero():
    path = Custom(lambda t: 1.0, lambda t: 80 * t)
    assert path.coefficients(INSIDE).alpha_rate.abs().max() == 0


def test_paths_are_values():
    assert VariancePreserving() == VariancePreserving(0.1, 20.0)
    assert len({Tabulated([0.9, 0.5]), Tabulated([0.9, 0.5]), Straight()}) == 2


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Custom(lambda t: t, lambda t: 1 - t), "alpha"),
        (lambda: Custom(lambda t: 1 - 2 * t, lambda t: t), "alpha"),
        (lambda: Retimed(Straight(), lambda t: 1 - t), "clock"),
        (lambda: Retimed(Straight(), lambda t: t + torch.sin(6.283185307179586 * t)), "clock"),
        (lambda: VariancePreserving(2.0, 1.0), "beta_max"),
        (lambda: VarianceExploding(0.0), "sigma_max"),
        (lambda: GeometricVarianceExploding(1.0, 0.5), "sigma_max"),
        (lambda: Tabulated([0.5, 0.9]), "alphas_cumprod"),
        (lambda: shifted_clock(-1.0), "shift"),
        (lambda: Straight().coefficients(1.5), "t"),
        (lambda: Straight().coefficients(float("nan")), "t"),
        (lambda: Cosine().coefficients(torch.tensor([-0.1])), "t"),
    ],
    ids=[
        "reversed", "negative", "clock_back", "clock_turns", "rates", "no_noise", "order", "table", "shift",
        "late", "nan", "early",
    ],
)  # fmt: skip
def test_what_is_no_path_or_no_time_is_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_what_is_not_a_function_or_a_path_is_refused():
    with pytest.raises(ArgumentTypeError):
        Custom(1.0, lambda t: t)
    with pytest.raises(ArgumentTypeError, match=r"Straight\(\)"):
        Retimed(Straight, lambda t: t)
    with pytest.raises(ArgumentTypeError):
        Tabulated("no")
