"""Guidance is affine in the field; the exact cases, the options, and what is refused."""

import pytest
import torch
from torch import nn

from thalweg.errors import ArgumentError, ArgumentTypeError
from thalweg.flows import (
    DDIM,
    KINDS,
    Cosine,
    Field,
    Straight,
    VariancePreserving,
    autoguidance,
    classifier_free,
    classifier_guidance,
    sample,
    time_grid,
)
from thalweg.noise import Key
from thalweg.problems import GaussianMixture
from thalweg.rollouts import Checkpointed, Route, Skipped
from thalweg.step import Backprop

MIXTURE = GaussianMixture.drawn(3, 2, seed=1)
NULL = {"label": None}


def points(path, count=30):
    data, labels = MIXTURE.sample(count, Key(0))
    t = torch.linspace(0.05, 0.95, count, dtype=torch.float64)
    return path.noised(data, torch.randn_like(data), t), t, labels


@pytest.mark.parametrize("path", [Cosine(), Straight(), VariancePreserving()], ids=repr)
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0, -0.5])
def test_guidance_is_the_same_in_every_prediction(path, weight):
    """Computed in D, E, S, U or V and then converted."""
    x, t, labels = points(path)
    guided = [classifier_free(MIXTURE.field(path, kind), weight, null=NULL) for kind in KINDS]
    for target in KINDS:
        found = [field.predict(target, x, t, label=labels) for field in guided]
        for value in found[1:]:
            torch.testing.assert_close(value, found[0], rtol=1e-9, atol=1e-9)


def test_weight_one_is_the_condition_and_weight_zero_none():
    x, t, labels = points(Cosine())
    field = MIXTURE.field(Cosine(), "score")
    assert classifier_free(field, 1.0, null=NULL) is field
    without = classifier_free(field, 0.0, null=NULL)(x, t, label=labels)
    assert torch.equal(without, field(x, t))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_classifier_guidance_with_the_exact_classifier_is_classifier_free(kind, weight):
    path = VariancePreserving()
    x, t, labels = points(path)

    def log_probability(x, t, label):
        return MIXTURE.label_log_probabilities(x, t, path).gather(1, label[:, None])[:, 0]

    by_classifier = classifier_guidance(MIXTURE.field(path, kind), log_probability, weight)
    free = classifier_free(MIXTURE.field(path, kind), weight, null=NULL)
    torch.testing.assert_close(
        by_classifier(x, t, label=labels), free(x, t, label=labels), rtol=1e-9, atol=1e-9
    )
    oracle = MIXTURE.guided_field(path, weight, kind)
    torch.testing.assert_close(free(x, t, label=labels), oracle(x, t, label=labels), rtol=1e-9, atol=1e-9)


def test_an_interval_guides_inside_and_leaves_the_condition_outside():
    x, t, labels = points(Straight())
    field = MIXTURE.field(Straight())
    guided = classifier_free(field, 3.0, null=NULL, interval=(0.3, 0.6))(x, t, label=labels)
    everywhere = classifier_free(field, 3.0, null=NULL)(x, t, label=labels)
    inside = (t >= 0.3) & (t <= 0.6)
    torch.testing.assert_close(guided[inside], everywhere[inside])
    torch.testing.assert_close(guided[~inside], field(x, t, label=labels)[~inside])


def test_guidance_does_not_sample_the_tilted_law():
    """The negative check: noising and tilting do not commute.

    Two Gaussians of one variance c, at distance 1 along one axis: the tilted law is a Gaussian again, of
    variance c around a mean extrapolated by the weight. The guided flow ends elsewhere.
    """
    gaussians = GaussianMixture.isotropic([[0.0], [1.0]], 1.0, weights=[0.5, 0.5])
    path, weight = VariancePreserving(), 3.0
    guided = classifier_free(gaussians.field(path), weight, null=NULL)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 1, dtype=torch.float64, generator=generator)
    label = torch.ones(2000, dtype=torch.long)
    grid = time_grid(path, 100, "half_log_snr", last=1e-3)
    found = sample(guided, noise, grid, solver=DDIM(), conditions={"label": label})
    axis = torch.linspace(-8, 12, 4001, dtype=torch.float64)[:, None]
    given, all_of = (
        gaussians.log_density(axis, 0.0, path, label) for label in (torch.ones(4001, dtype=torch.long), None)
    )
    tilted = torch.softmax(all_of + weight * (given - all_of), 0)
    mean = (tilted * axis[:, 0]).sum()
    assert abs(float(found.mean() - mean)) > 5 * float(found.std()) / 2000**0.5


def test_rescaling_brings_the_deviation_of_the_data_back():
    path = Cosine()
    x, t, labels = torch.randn(6, 2, dtype=torch.float64), 0.5, torch.tensor([0, 1, 2, 0, 1, 2])
    field = MIXTURE.field(path, "v")
    plain = field.predict("data", x, t, label=labels).std(1)
    full = classifier_free(field, 4.0, null=NULL, rescale=1.0).predict("data", x, t, label=labels).std(1)
    torch.testing.assert_close(full, plain)
    none = classifier_free(field, 4.0, null=NULL).predict("data", x, t, label=labels)
    half = classifier_free(field, 4.0, null=NULL, rescale=0.5).predict("data", x, t, label=labels)
    torch.testing.assert_close(half, none * (0.5 + 0.5 * (plain / none.std(1))[:, None]))


def test_projection_drops_what_lies_along_the_prediction():
    x, labels = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    field = MIXTURE.field(Cosine(), "noise")
    data = field.predict("data", x, 0.5, label=labels)
    projected = classifier_free(field, 4.0, null=NULL, parallel=0.0).predict("data", x, 0.5, label=labels)
    plain = classifier_free(field, 4.0, null=NULL).predict("data", x, 0.5, label=labels)
    assert ((projected - data) * data).sum(1).abs().max() < 1e-12
    along = ((plain - data) * data).sum(1, keepdim=True) / data.square().sum(1, keepdim=True)
    torch.testing.assert_close(projected, plain - along * data)
    almost = classifier_free(field, 4.0, null=NULL, parallel=1 - 1e-12).predict("data", x, 0.5, label=labels)
    torch.testing.assert_close(almost, plain)


def test_a_worse_version_is_extrapolated_from():
    x, t, _ = points(Straight())
    good = MIXTURE.field(Straight())
    bad = Field(lambda x, t: good(x, t) * 0.9, Straight())
    torch.testing.assert_close(autoguidance(good, bad, 2.0)(x, t), 1.1 * good(x, t))
    torch.testing.assert_close(autoguidance(good, bad, 1.0)(x, t), good(x, t))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2).double()

    def forward(self, x, t, c):
        return torch.tanh(self.inner(torch.cat([x, t[:, None], c.expand(len(x), 1)], 1)))


def test_gradients_through_guided_samplers_agree_and_reach_the_parameters():
    found = []
    for policy in (Backprop(), Checkpointed(slots=2)):
        torch.manual_seed(0)
        net = Conditional()
        guided = classifier_free(
            Field(net, Cosine(), "v"), 2.0, null={"c": torch.zeros(1).double()}, rescale=0.3
        )
        assert len(list(guided.network.parameters())) == 2
        x = torch.ones(3, 2, dtype=torch.float64).cumsum(0).requires_grad_()
        c = torch.ones(1, dtype=torch.float64, requires_grad=True)
        out = sample(guided, x, [0.9, 0.6, 0.3, 0.1], gradient=policy, conditions={"c": c})
        found.append(torch.autograd.grad(out.square().sum(), [x, c, *net.parameters()]))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_masks_reach_both_calls_of_a_guided_network():
    """Over one step, half the parameters' Jacobian is half their gradient, through both calls."""
    found = []
    for policy in (Backprop(), Route(parameters=0.5), Skipped()):
        torch.manual_seed(0)
        net = Conditional()
        guided = classifier_free(Field(net, Cosine(), "v"), 2.0, null={"c": torch.zeros(1).double()})
        x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        c = torch.ones(1, dtype=torch.float64)
        out = sample(guided, x, [0.9, 0.4], gradient=policy, conditions={"c": c})
        found.append(torch.autograd.grad(out.sum(), [x, *net.parameters()], allow_unused=True))
    exact, halved, skipped = found
    torch.testing.assert_close(halved[0], exact[0])
    for mine, true in zip(halved[1:], exact[1:]):
        torch.testing.assert_close(mine, true / 2)
    assert skipped[1:] == (None, None)
    assert (skipped[0] != exact[0]).any()


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda f: classifier_free(f, float("nan"), null=NULL), "weight"),
        (lambda f: classifier_free(f, 2.0, null=NULL, interval=(0.6, 0.3)), "interval"),
        (lambda f: classifier_free(f, 2.0, null=NULL, rescale=1.5), "rescale"),
        (lambda f: classifier_free(f, 2.0, null=NULL, parallel=-1.0), "parallel"),
        (lambda f: autoguidance(f, MIXTURE.field(Cosine()), 2.0), "weaker"),
        (lambda f: autoguidance(f, MIXTURE.field(Straight(), "noise"), 2.0), "weaker"),
    ],
    ids=["weight", "interval", "rescale", "parallel", "path", "kind"],
)
def test_bad_guidance_is_refused(make, argument):
    with pytest.raises(ArgumentError) as refusal:
        make(MIXTURE.field(Straight()))
    assert refusal.value.argument == argument


def test_types_are_refused_by_name():
    field = MIXTURE.field(Straight())
    with pytest.raises(ArgumentTypeError, match="null"):
        classifier_free(field, 2.0, null=None)
    with pytest.raises(ArgumentTypeError, match="weight"):
        classifier_free(field, "strong", null=NULL)
    with pytest.raises(ArgumentTypeError, match="log_probability"):
        classifier_guidance(field, None, 2.0)
    with pytest.raises(ArgumentTypeError, match="field"):
        autoguidance(lambda x, t: x, field, 2.0)
