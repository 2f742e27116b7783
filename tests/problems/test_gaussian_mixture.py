"""The Gaussian-mixture oracle, checked against autograd, against sampling, and against itself."""

import math

import pytest
import torch

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import Cosine, Straight, Tabulated, VarianceExploding, VariancePreserving
from thalweg.noise import Key
from thalweg.problems import GaussianMixture

PATHS = {
    "straight": Straight(),
    "cosine": Cosine(),
    "variance_preserving": VariancePreserving(),
    "variance_exploding": VarianceExploding(5.0),
}
every_path = pytest.mark.parametrize("path", list(PATHS.values()), ids=list(PATHS))
MIXTURE = GaussianMixture.drawn(3, 2, seed=1)


def points(path, count=40, seed=0):
    """Data noised to times inside (0, 1), with labels, of which every third is missing."""
    data, labels = MIXTURE.sample(count, Key(seed))
    generator = torch.Generator().manual_seed(seed)
    t = 0.05 + 0.9 * torch.rand(count, dtype=torch.float64, generator=generator)
    noise = torch.randn(data.shape, dtype=torch.float64, generator=generator)
    labels[::3] = -1
    return path.noised(data, noise, t), t, labels


@every_path
def test_score_is_the_gradient_of_log_density(path):
    x, t, labels = points(path)
    x.requires_grad_()
    for label in (None, labels):
        (slope,) = torch.autograd.grad(MIXTURE.log_density(x, t, path, label).sum(), x)
        torch.testing.assert_close(MIXTURE.predict("score", x, t, path, label), slope, rtol=1e-12, atol=1e-12)


@every_path
def test_tweedie_and_the_probability_flow(path):
    """D = (x + s^2 S) / a, E = -s S, U = f x - g^2 S / 2, V = a E - s D."""
    x, t, labels = points(path)
    a, s = (c[:, None] for c in path.coefficients(t)[:2])
    data, noise, score, velocity, v = (
        MIXTURE.predict(kind, x, t, path, labels) for kind in ("data", "noise", "score", "velocity", "v")
    )
    torch.testing.assert_close(data, (x + s**2 * score) / a, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(noise, -s * score, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a * data + s * noise, x, rtol=1e-12, atol=1e-12)
    flow = path.drift(t)[:, None] * x - path.squared_diffusion(t)[:, None] * score / 2
    torch.testing.assert_close(velocity, flow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v, a * noise - s * data)


@every_path
def test_continuity_equation_holds(path):
    """d log p / dt + div U + U . S = 0."""
    x, t, _ = points(path)
    (rate,) = torch.func.jvp(lambda t: MIXTURE.log_density(x, t, path), (t,), (torch.ones_like(t),))[1:]
    x.requires_grad_()
    velocity = MIXTURE.predict("velocity", x, t, path)
    divergence = sum(
        torch.autograd.grad(velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    residual = rate + divergence + (velocity * MIXTURE.predict("score", x, t, path)).sum(1)
    assert residual.abs().max() < 1e-10 * (1 + rate.abs().max())


@every_path
def test_exact_classifier_guidance_is_classifier_free_guidance(path):
    x, t, labels = points(path)
    labels = labels.clamp(min=0)
    for weight in (0.0, 1.0, 3.0):
        field = MIXTURE.guided_field(path, weight, "velocity")
        without = MIXTURE.predict("velocity", x, t, path)
        given = MIXTURE.predict("velocity", x, t, path, labels)
        torch.testing.assert_close(
            field(x, t, label=labels), without + weight * (given - without), rtol=1e-9, atol=1e-9
        )


def test_guidance_is_differentiable_and_leaves_no_graph_without_one():
    x, t, labels = points(Cosine())
    field = MIXTURE.guided_field(Cosine(), 2.0, "noise")
    assert not field(x, t, label=labels.clamp(min=0)).requires_grad
    x = x[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: field(x, t[:4], label=labels[:4].clamp(min=0)), x)


@every_path
def test_gaussian_flow_map_is_a_semigroup_along_the_velocity(path):
    """Psi_{u->t} Psi_{s->u} = Psi_{s->t}, dPsi/dt = U, and the two-point identity of mean flows."""
    gaussian = GaussianMixture.drawn(1, 3, seed=2)
    x = torch.randn(6, 3, dtype=torch.float64)
    s, u, t = 0.9, 0.4, 0.15
    once = gaussian.flow(x, s, t, path)
    twice = gaussian.flow(gaussian.flow(x, s, u, path), u, t, path)
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=1e-12)
    h = 1e-6
    slope = (gaussian.flow(x, s, t + h, path) - gaussian.flow(x, s, t - h, path)) / (2 * h)
    torch.testing.assert_close(slope, gaussian.predict("velocity", once, t, path), rtol=1e-6, atol=1e-6)

    def mean_velocity(start, state):
        return (gaussian.flow(state, start, t, path) - state) / (t - start)

    # along the flow the mean velocity h satisfies h = U - (s - t) dh/ds
    ahead, behind = (mean_velocity(s + e, gaussian.flow(x, s, s + e, path)) for e in (h, -h))
    along = (ahead - behind) / (2 * h)
    velocity = gaussian.predict("velocity", x, s, path)
    torch.testing.assert_close(mean_velocity(s, x), velocity - (s - t) * along, rtol=1e-6, atol=1e-6)


@every_path
def test_the_numerical_flow_agrees_with_the_closed_form(path):
    """A mixture of one Gaussian said twice has no closed form here, but the same flow."""
    one = GaussianMixture.drawn(1, 2, seed=3)
    twice = GaussianMixture(torch.tensor([0.5, 0.5]), one.means.repeat(2, 1), one.covariances.repeat(2, 1, 1))
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(
        twice.flow(x, 0.95, 0.1, path), one.flow(x, 0.95, 0.1, path), rtol=1e-7, atol=1e-7
    )


def test_labels_pick_the_component_and_missing_ones_pick_none():
    x, t, labels = points(Straight())
    with_labels = MIXTURE.predict("data", x, t, Straight(), labels)
    torch.testing.assert_close(with_labels[::3], MIXTURE.predict("data", x, t, Straight())[::3])
    single = GaussianMixture(torch.ones(1), MIXTURE.means[1:2], MIXTURE.covariances[1:2])
    mine = labels == 1
    torch.testing.assert_close(with_labels[mine], single.predict("data", x[mine], t[mine], Straight()))
    torch.testing.assert_close(
        MIXTURE.log_density(x, t, Straight(), labels)[mine], single.log_density(x[mine], t[mine], Straight())
    )


def test_bayes_rule_ties_densities_and_labels():
    x, t, _ = points(Cosine())
    chances = MIXTURE.label_log_probabilities(x, t, Cosine())
    for k in range(3):
        label = torch.full((len(x),), k)
        joint = MIXTURE.log_density(x, t, Cosine(), label) + MIXTURE.weights[k].log()
        torch.testing.assert_close(chances[:, k], joint - MIXTURE.log_density(x, t, Cosine()))


def test_samples_have_the_moments_of_the_mixture():
    data, labels = MIXTURE.sample(40_000, Key(5))
    mean = MIXTURE.weights @ MIXTURE.means
    error = data.std(0) / len(data) ** 0.5
    assert ((data.mean(0) - mean).abs() < 5 * error).all()
    share = torch.bincount(labels).double() / len(labels)
    assert ((share - MIXTURE.weights).abs() < 5 * (MIXTURE.weights / len(labels)).sqrt()).all()
    log_density = MIXTURE.log_density(data, 0.0, Straight())
    assert torch.isfinite(log_density).all()
    for k in range(3):
        mine = data[labels == k]
        torch.testing.assert_close(mine.T.cov(), MIXTURE.covariances[k], rtol=0.08, atol=0.02)


def test_the_density_integrates_to_one():
    axis = torch.linspace(-9, 9, 400, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    for t in (0.3, 0.8):
        total = MIXTURE.log_density(x, t, Cosine()).exp().sum() * cell
        assert abs(float(total) - 1) < 1e-6


@pytest.mark.parametrize("kind", ["data", "noise", "velocity", "v"])
def test_both_ends_are_regular(kind):
    x = torch.randn(4, 2, dtype=torch.float64)
    for t in (0.0, 1.0):
        assert torch.isfinite(MIXTURE.predict(kind, x, t, Straight())).all()
    torch.testing.assert_close(MIXTURE.predict("data", x, 0.0, Straight()), x)
    torch.testing.assert_close(MIXTURE.predict("noise", x, 1.0, Straight()), x)


def test_one_point_is_predicted_from_anywhere():
    point = GaussianMixture.isotropic([[1.0, -2.0]], 0.0)
    x, t, _ = points(VariancePreserving())
    torch.testing.assert_close(
        point.predict("data", x, t, VariancePreserving()), point.means.expand(len(x), 2)
    )


def test_lower_precision_comes_back_as_it_came():
    x, t, labels = points(Straight())
    found = MIXTURE.predict("velocity", x.float(), t, Straight(), labels)
    assert found.dtype == torch.float32
    exact = MIXTURE.predict("velocity", x, t, Straight(), labels)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


EYE = torch.eye(2, dtype=torch.float64)[None]


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: GaussianMixture(torch.tensor([0.4]), torch.zeros(1, 2), EYE), "weights"),
        (lambda: GaussianMixture(torch.tensor([2.0, -1.0]), MIXTURE.means[:2], EYE[[0, 0]]), "weights"),
        (lambda: GaussianMixture(torch.ones(1), torch.zeros(2), EYE), "means"),
        (lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 3), EYE), "covariances"),
        (lambda: GaussianMixture(torch.ones(1), torch.zeros(1, 2), -EYE), "covariances"),
        (lambda: GaussianMixture.isotropic([[0.0]], math.nan), "deviation"),
        (lambda: MIXTURE.predict("data", torch.zeros(3, 5), 0.5, Straight()), "x"),
        (lambda: MIXTURE.predict("data", torch.zeros(3, 2), 0.5, Straight(), torch.full((3,), 7)), "label"),
        (lambda: MIXTURE.predict("data", torch.zeros(3, 2), 0.5, Straight(), torch.zeros(2).long()), "label"),
        (lambda: MIXTURE.predict("clean", torch.zeros(3, 2), 0.5, Straight()), "kind"),
        (lambda: MIXTURE.field(Straight(), "epsilon"), "predicts"),
    ],
    ids=["sum", "sign", "shape", "size", "definite", "nan", "x", "unknown", "count", "clean", "kind"],
)  # fmt: skip
def test_what_makes_no_mixture_is_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make()
    assert refusal.value.argument == argument


def test_labels_are_integers():
    with pytest.raises(ArgumentTypeError, match="int64"):
        MIXTURE.predict("data", torch.zeros(3, 2), 0.5, Straight(), torch.zeros(3))
    assert Tabulated([0.9, 0.5])
