"""Two mixtures: the closed-form velocity against regression, the one-sided oracle, and autograd."""

import pytest
import torch

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import Cosine, Straight
from thalweg.noise import Key
from thalweg.problems import GaussianMixture, MixturePair

PAIR = MixturePair(GaussianMixture.drawn(3, 2, seed=1), GaussianMixture.drawn(2, 2, seed=2))
STANDARD = GaussianMixture.isotropic([[0.0, 0.0]], 1.0)


@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
def test_a_standard_normal_source_gives_the_oracle_of_noising(path):
    pair = MixturePair(PAIR.data, STANDARD)
    x = torch.randn(20, 2, dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 20, dtype=torch.float64)
    torch.testing.assert_close(
        pair.field(path)(x, t), PAIR.data.predict("velocity", x, t, path), rtol=1e-11, atol=1e-11
    )
    data, source = pair.ends(x, t, path)
    torch.testing.assert_close(data, PAIR.data.predict("data", x, t, path), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(source, PAIR.data.predict("noise", x, t, path), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", [Straight(), Cosine()], ids=["straight", "cosine"])
def test_the_law_follows_the_velocity(path):
    """The continuity equation d_t log p + div v + v . grad log p = 0, by central differences in t."""
    x = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    t, h = 0.4, 1e-5

    def log_density(at):
        law = PAIR.law(at, path)
        parts = [
            torch.distributions.MultivariateNormal(m, c).log_prob(x)
            for m, c in zip(law.means, law.covariances)
        ]
        return (torch.stack(parts, 1) + law.weights.log()).logsumexp(1)

    change = (log_density(t + h) - log_density(t - h)) / (2 * h)
    (score,) = torch.autograd.grad(log_density(t).sum(), x)
    velocity = PAIR.field(path)(x, t)
    divergence = sum(
        torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    residual = change + divergence + (velocity * score).sum(1)
    assert float(residual.detach().abs().max()) < 1e-7


def test_the_velocity_is_the_mean_slope_of_the_lines():
    """Regression on a feature of x leaves no residual: E[(slope - v(X_t)) f(X_t)] = 0."""
    data, source, _ = PAIR.draw(20000, Key(0))
    for t in (0.2, 0.7):
        x = Straight().noised(data, source, t)
        residual = source - data - PAIR.field(Straight())(x, t)
        for feature in (torch.ones_like(x), x, torch.sin(3 * x)):
            product = residual * feature
            assert bool((product.mean(0).abs() < 5 * product.std(0) / len(x) ** 0.5).all())


def test_draws_are_independent_and_come_from_the_key():
    first, again = PAIR.draw(2000, Key(3)), PAIR.draw(2000, Key(3))
    assert torch.equal(first.data, again.data)
    assert torch.equal(first.source, again.source)
    both = torch.cat([first.data, first.source], 1).T
    assert float(torch.corrcoef(both)[:2, 2:].abs().max()) < 5 / 2000**0.5


def test_what_is_no_pair_is_refused():
    with pytest.raises(ArgumentTypeError, match="source"):
        MixturePair(STANDARD, None)
    with pytest.raises(ArgumentError, match="dimension 2"):
        MixturePair(STANDARD, GaussianMixture.drawn(2, 3))
    with pytest.raises(ArgumentError, match=r"shape \(batch, 2\)"):
        PAIR.ends(torch.zeros(3), 0.5, Straight())
