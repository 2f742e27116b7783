"""Binary units: exact zeros, bits that come again, and gradients that are given or refused."""

import math
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from thalweg.blackbox import ForwardGradient
from thalweg.errors import UnsupportedError
from thalweg.noise import Key
from thalweg.problems import BernoulliNet
from thalweg.stochastic import BinaryNeuron, StraightThrough

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def unit_gradient(unit, a, weights):
    logits = a.clone().requires_grad_()
    torch.manual_seed(1)
    (unit(logits) * weights).sum().backward()
    return logits.grad


@pytest.mark.parametrize("gradient", [StraightThrough(), None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_e10_forward_output_contains_literal_zeros_and_ones(dtype, gradient):
    logits = torch.linspace(-6, 6, 601, dtype=dtype)
    bits = BinaryNeuron(gradient)(logits)
    assert bits.dtype == dtype
    zeros, ones = (bits == 0).sum(), (bits == 1).sum()
    assert zeros + ones == 601
    assert zeros > 100
    assert ones > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", [-4.0, 0.3, 7.0])
def test_units_fire_with_the_probability_of_their_logit(dtype, a):
    count = 200_000
    logits = torch.full((count,), a, dtype=dtype)
    p = float(torch.sigmoid(logits[0].double()))
    rate = BinaryNeuron()(logits).float().mean().item()
    # the expected number of the rarer outcome is at least 180
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_evaluation_mode_is_a_threshold():
    logits = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    assert BinaryNeuron().eval()(logits).tolist() == [0, 0, 1, 1]
    assert BinaryNeuron(threshold=1.0).eval()(logits).tolist() == [0, 0, 0, 1]


def moments_of_straight_through(net, slope):
    """The estimator's mean, from its definition: dL/dh at the drawn outcome, times the slope."""

    def estimator(outcomes, logits, losses):
        (slopes,) = torch.autograd.grad(losses.sum(), outcomes)
        p = torch.sigmoid(logits)
        return slopes if slope == "identity" else slopes * p * (1 - p)

    return net.moments(estimator)[0]


class Affine(BernoulliNet):
    """The same net with a loss that is affine in the gates."""

    def losses(self, outcomes):
        return (outcomes @ self.hidden_weights @ self.output_weights).squeeze(-1) - self.y


def test_e5_sigmoid_slope_is_exact_for_affine_loss_and_identity_is_off_by_its_factor():
    net = Affine(gates=5)
    p = torch.sigmoid(net.logits()).detach()
    exact = net.exact_logit_gradient()
    torch.testing.assert_close(moments_of_straight_through(net, "sigmoid"), exact, rtol=0, atol=1e-12)
    identity = moments_of_straight_through(net, "identity")
    torch.testing.assert_close(identity, exact / (p * (1 - p)), rtol=0, atol=1e-12)
    # and where the loss is not affine, straight-through is biased
    curved = BernoulliNet(gates=5)
    bias = moments_of_straight_through(curved, "sigmoid") - curved.exact_logit_gradient()
    assert bias.abs().max() > 1e-3


def test_e5_the_unit_itself_has_these_gradients():
    a, weights = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    p = torch.sigmoid(a)
    torch.testing.assert_close(unit_gradient(BinaryNeuron(StraightThrough("identity")), a, weights), weights)
    torch.testing.assert_close(
        unit_gradient(BinaryNeuron(StraightThrough("sigmoid")), a, weights), weights * p * (1 - p)
    )


def test_e8_identity_slope_equals_the_two_outcome_categorical_of_torch():
    # torch's categorical straight-through returns d loss / d probability; ours is with respect to the logit
    a, value = torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    logits = a.clone().requires_grad_()
    p = torch.sigmoid(logits)
    sample = torch.distributions.OneHotCategoricalStraightThrough(torch.stack([1 - p, p], -1)).rsample()
    (sample[:, 1] * value).sum().backward()
    ours = unit_gradient(BinaryNeuron(StraightThrough("sigmoid")), a, value)
    torch.testing.assert_close(ours, logits.grad)


@pytest.mark.parametrize("slope", ["identity", "sigmoid"])
def test_bits_are_the_same_under_checkpoint(slope):
    unit, layer = BinaryNeuron(StraightThrough(slope)), nn.Linear(4, 8)
    head = nn.Linear(8, 1)
    x = torch.randn(16, 4)
    bits = []

    def body(x):
        bits.append(unit(layer(x)))
        return torch.tanh(head(bits[-1]))

    found = []
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=False)):
        torch.manual_seed(4)
        found.append(torch.autograd.grad(run(x).pow(2).sum(), [layer.weight, head.weight]))
    assert len(bits) == 3
    assert torch.equal(bits[0], bits[1])
    assert torch.equal(bits[1], bits[2])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_bits_are_the_same_under_double_backward():
    unit = BinaryNeuron(StraightThrough("sigmoid"))
    a = torch.randn(20, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((unit(a) ** 2).sum(), a, create_graph=True)
    bits = (first / (2 * torch.sigmoid(a) * (1 - torch.sigmoid(a)))).detach().round()
    (second,) = torch.autograd.grad(first.sum(), a)
    s = torch.sigmoid(a).detach()
    # d/da of 2 h s(1-s) with dh/da = s(1-s)
    expected = 2 * (s * (1 - s)) ** 2 + 2 * bits * s * (1 - s) * (1 - 2 * s)
    torch.testing.assert_close(second, expected)


def test_bits_are_the_same_compiled():
    unit = BinaryNeuron()
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    found = []
    for run in (unit, compiled):
        logits = torch.linspace(-2, 2, 50).requires_grad_()
        torch.manual_seed(9)
        bits = run(logits)
        (bits * torch.arange(50.0)).sum().backward()
        found.append((bits.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("training", [True, False])
def test_a_unit_without_gradient_compiles_for_inference(training):
    unit = BinaryNeuron(gradient=None).train(training)
    with torch.no_grad():
        bits = torch.compile(unit, backend="aot_eager", fullgraph=True)(torch.linspace(-3, 3, 40))
    assert set(bits.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("training", [True, False])
def test_a_unit_without_gradient_refuses_every_plain_derivative(training):
    unit = BinaryNeuron(gradient=None).train(training)
    a = torch.zeros(4, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"thalweg\.backward.*ScoreFunction"):
        unit(a).sum().backward()
    with pytest.raises(UnsupportedError, match="ScoreFunction"):
        torch.autograd.grad(unit(a).sum(), a)
    with pytest.raises(UnsupportedError, match="ScoreFunction"):
        torch.func.grad(lambda a: unit(a).sum())(a.detach())
    with pytest.raises(UnsupportedError, match="ScoreFunction"):
        torch.func.jvp(lambda a: unit(a).sum(), (a.detach(),), (torch.ones(4),))
    with pytest.raises(UnsupportedError, match="ScoreFunction"):
        ForwardGradient().estimate(lambda: unit(a).sum(), [a], Key(0))
    assert a.grad is None


def test_vmap_over_units():
    a = torch.zeros(6, 5)
    bits = torch.vmap(BinaryNeuron(), randomness="different")(a)
    assert bits.shape == a.shape
    slopes = torch.vmap(torch.func.grad(lambda a: BinaryNeuron()(a).sum()), randomness="different")(a)
    assert torch.equal(slopes, torch.ones(6, 5))


def test_forward_gradient_uses_the_stand_in():
    unit, a = BinaryNeuron(), torch.zeros(1, requires_grad=True)
    assert ForwardGradient().estimate(lambda: 3 * unit(a).sum(), [a], Key(0)).gradients[0] == 3


def test_autocast():
    layer, unit = nn.Linear(4, 8), BinaryNeuron()
    with torch.autocast("cpu", torch.bfloat16):
        bits = unit(layer(torch.randn(3, 4)))
    bits.float().sum().backward()
    assert bits.dtype == torch.bfloat16
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_nan_is_no_decision_and_infinities_are(training):
    logits = torch.tensor([float("nan"), float("inf"), -float("inf")])
    bits = BinaryNeuron().train(training)(logits)
    assert bits[0].isnan()
    assert bits[1:].tolist() == [1.0, 0.0]


@hypothesis.given(
    shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(DTYPES), training=st.booleans()
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape_and_dtype(shape, dtype, training):
    for gradient in (StraightThrough(), None):
        bits = BinaryNeuron(gradient).train(training)(torch.randn(shape, dtype=dtype))
        assert bits.shape == torch.Size(shape)
        assert bits.dtype == dtype


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: StraightThrough(slope="tanh"), "slope"),
        (lambda: BinaryNeuron(gradient="straight-through"), "gradient"),
        (lambda: BinaryNeuron(gradient=StraightThrough), "gradient"),
        (lambda: BinaryNeuron(threshold="0"), "threshold"),
        (lambda: BinaryNeuron(threshold=float("nan")), "threshold"),
        (lambda: BinaryNeuron()(torch.zeros(2, dtype=torch.long)), "logits"),
        (lambda: BinaryNeuron()(torch.zeros(2, dtype=torch.complex64)), "logits"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected"):
        call()


def test_units_print_and_pickle():
    unit = BinaryNeuron(StraightThrough("sigmoid"), threshold=0.5)
    assert repr(unit) == "BinaryNeuron(gradient=StraightThrough(slope='sigmoid'), threshold=0.5)"
    assert pickle.loads(pickle.dumps(unit)).gradient == unit.gradient
