"""The exact laws of the units: means, expected gradients, and parity with torch and snntorch."""

import math
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from thalweg import noise
from thalweg.errors import UnsupportedError
from thalweg.stochastic import (
    BinaryNeuron,
    CategoricalNeuron,
    Concrete,
    NoisyRectifier,
    ReinMax,
    SpikingNeuron,
    StochasticTimesSmooth,
    StraightThrough,
    StraightThroughGumbel,
    tape,
)
from thalweg.stochastic.categorical import Gradient

A = torch.linspace(-4, 4, 33, dtype=torch.float64)


def drawing(numbers: Tensor) -> mock._patch:
    """Let units see these uniform numbers."""
    return mock.patch.object(tape, "uniform_numbers", lambda logits, key: numbers.expand_as(logits))


def both_coins(unit: torch.nn.Module, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The outcomes of a unit with a coin in it and their probabilities: u below or above its chance."""
    chance = unit.probability(a).detach()
    for numbers, weight in ((chance / 2, chance), ((1 + chance) / 2, 1 - chance)):
        with drawing(numbers):
            yield unit(a), weight


@pytest.mark.parametrize("exponent", [0.5, 0.2, 0.9])
def test_e3_stochastic_times_smooth_is_p_on_average(exponent: float) -> None:
    unit = StochasticTimesSmooth(exponent=exponent)
    mean = sum(out * weight for out, weight in both_coins(unit, A))
    torch.testing.assert_close(mean, torch.sigmoid(A), rtol=0, atol=1e-12)
    torch.testing.assert_close(unit.probability(A), torch.sigmoid(A) ** exponent, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("exponent", "scale"), [(0.5, 1.0), (0.5, 2.0), (0.2, 1.0), (0.2, 1.25)])
def test_e3_the_gradient_of_a_linear_loss_is_one_minus_r_of_the_true_one(
    exponent: float, scale: float
) -> None:
    a = A.clone().requires_grad_()
    unit = StochasticTimesSmooth(scale=scale, exponent=exponent)
    mean = sum(torch.autograd.grad(out.sum(), a)[0] * weight for out, weight in both_coins(unit, a))
    p = torch.sigmoid(A)
    torch.testing.assert_close(mean, scale * (1 - exponent) * p * (1 - p), rtol=0, atol=1e-12)


def test_e3_the_unit_draws_with_the_root_of_p_and_not_with_p() -> None:
    count = 400_000
    out = StochasticTimesSmooth()(torch.full((count,), -1.0))
    p = 1 / (1 + math.e)
    chance = math.sqrt(p)
    rate = (out > 0).double().mean()
    assert abs(rate - chance) < 5 * math.sqrt(chance * (1 - chance) / count)
    assert abs(rate - p) > 50 * math.sqrt(p * (1 - p) / count)


def quadrature(function: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    """The mean of a function of the noise by the trapezoid rule in the noise itself, wide and fine."""
    z = torch.linspace(-60, 60, 600_001, dtype=torch.float64)
    if kind == "logistic":
        density = torch.sigmoid(z) * torch.sigmoid(-z)
    else:
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(function(z) * density, z)


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
@pytest.mark.parametrize("a", [-3.0, -0.4, 0.0, 2.5])
def test_e4_mean_and_probability_of_the_noisy_rectifier_by_quadrature(kind: str, a: float) -> None:
    unit, logits = NoisyRectifier(kind), torch.tensor(a, dtype=torch.float64)

    def drawn(z: Tensor) -> Tensor:
        with (
            mock.patch.object(noise, "normal", return_value=z),
            drawing(torch.sigmoid(-z)),
        ):
            return unit(logits.expand(len(z)))

    # a jump or a kink costs the rule one interval: 120/600000
    mean = quadrature(drawn, kind)
    fires = quadrature(lambda z: (drawn(z) > 0).double(), kind)
    torch.testing.assert_close(mean, unit.mean(logits), rtol=0, atol=1e-7)
    torch.testing.assert_close(fires, unit.probability(logits), rtol=0, atol=1e-4)
    if kind == "logistic":
        torch.testing.assert_close(unit.mean(logits), torch.nn.functional.softplus(logits))
        torch.testing.assert_close(unit.probability(logits), torch.sigmoid(logits))


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
def test_e4_the_drawn_noise_has_this_mean(kind: str) -> None:
    count, scale = 400_000, 0.7
    unit = NoisyRectifier(kind, scale=scale)
    a = torch.full((count,), 0.3, dtype=torch.float64)
    out = unit(a)
    assert abs(out.mean() - unit.mean(a[0])) < 5 * out.std() / math.sqrt(count)
    p = unit.probability(a[0])
    assert abs((out > 0).double().mean() - p) < 5 * torch.sqrt(p * (1 - p) / count)


def expected_gradient(gradient: Gradient, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """A categorical unit's mean gradient, by letting each category be drawn in turn."""
    unit = CategoricalNeuron(gradient)
    probabilities = torch.softmax(logits, -1)
    total = torch.zeros_like(logits)
    for category, probability in enumerate(probabilities):
        numbers = torch.full_like(logits, 1e-300)
        numbers[category] = 1 - 1e-16
        leaf = logits.clone().requires_grad_()
        with drawing(numbers):
            out = unit(leaf)
        assert out.argmax() == category
        total += probability * torch.autograd.grad(loss(out), leaf)[0]
    return total


def exact_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    everyone = torch.eye(len(logits), dtype=logits.dtype)
    losses = torch.stack([loss(one) for one in everyone])
    return torch.autograd.grad((torch.softmax(leaf, -1) * losses).sum(), leaf)[0]


def test_e6_reinmax_is_exact_for_quadratic_losses_and_straight_through_is_not() -> None:
    logits = torch.randn(6, dtype=torch.float64)
    weight, matrix = torch.randn(6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)

    def quadratic(d: Tensor) -> Tensor:
        return d @ matrix @ d + weight @ d

    exact = exact_gradient(quadratic, logits)
    torch.testing.assert_close(expected_gradient(ReinMax(), quadratic, logits), exact, rtol=0, atol=1e-12)
    off = expected_gradient(StraightThrough("softmax"), quadratic, logits) - exact
    assert off.abs().max() > 1e-2


def test_e6_both_are_exact_for_linear_losses() -> None:
    logits, weight = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    exact = exact_gradient(lambda d: weight @ d, logits)
    for gradient in (ReinMax(), StraightThrough("softmax")):
        found = expected_gradient(gradient, lambda d: weight @ d, logits)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_e6_reinmax_is_biased_for_cubic_losses() -> None:
    logits, weight = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def cubic(d: Tensor) -> Tensor:
        return (weight @ d) ** 3

    off = expected_gradient(ReinMax(), cubic, logits) - exact_gradient(cubic, logits)
    assert off.abs().max() > 1e-3


def test_e6_reinmax_is_its_formula_also_beside_masked_categories() -> None:
    logits = torch.tensor([[0.3, -1.0, -torch.inf, 2.0]], dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 4, dtype=torch.float64)
    out = CategoricalNeuron()(logits)
    (found,) = torch.autograd.grad(out, logits, cotangent)

    def jacobian(pi: Tensor) -> Tensor:
        return pi * (cotangent - (pi * cotangent).sum(-1, keepdim=True))

    plain = torch.softmax(logits.detach(), -1)
    expected = 2 * jacobian((out.detach() + plain) / 2) - 0.5 * jacobian(plain)
    torch.testing.assert_close(found, expected)
    assert found[0, 2] == 0


def test_categories_come_with_their_probabilities() -> None:
    count = 400_000
    logits = torch.tensor([0.0, 1.5, -2.0, -torch.inf, 0.7])
    p = torch.softmax(logits, -1)
    found = CategoricalNeuron()(logits.expand(count, -1)).mean(0)
    assert ((found - p).abs() <= 5 * torch.sqrt(p * (1 - p) / count)).all()
    assert found[3] == 0


def test_a_row_without_finite_logits_is_no_decision() -> None:
    for training in (True, False):
        out = CategoricalNeuron().train(training)(torch.full((1, 3), -torch.inf))
        assert out.isnan().all()


def test_e8_softmax_slope_equals_torchs_categorical_straight_through() -> None:
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    value = torch.randn(40, 5, dtype=torch.float64)
    sample = torch.distributions.OneHotCategoricalStraightThrough(logits=logits).rsample()
    (expected,) = torch.autograd.grad((sample * value).sum(), logits)
    out = CategoricalNeuron(StraightThrough("softmax"))(logits)
    (found,) = torch.autograd.grad((out * value).sum(), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_e8_gumbel_equals_torchs_for_the_same_numbers(temperature: float) -> None:
    numbers = torch.rand(30, 7, dtype=torch.float64)
    value = torch.randn(30, 7, dtype=torch.float64)
    logits = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    with drawing(numbers):
        ours = CategoricalNeuron(StraightThroughGumbel(temperature))(logits)
    # torch takes its Gumbel noise from exponential_, which is -log of a uniform number
    with mock.patch.object(Tensor, "exponential_", lambda self: self.copy_(-numbers.log())):
        peer = torch.nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)
    torch.testing.assert_close(ours, peer)
    found, expected = (torch.autograd.grad((out * value).sum(), logits)[0] for out in (ours, peer))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_e8_concrete_equals_torchs_relaxed_bernoulli_for_the_same_numbers(temperature: float) -> None:
    numbers = torch.rand(200, dtype=torch.float64)
    value = torch.randn(200, dtype=torch.float64)
    logits = torch.randn(200, dtype=torch.float64, requires_grad=True)
    with drawing(1 - numbers):
        ours = BinaryNeuron(Concrete(temperature, hard=False))(logits)
        hard = BinaryNeuron(Concrete(temperature))(logits)
    with mock.patch("torch.distributions.relaxed_bernoulli.clamp_probs", lambda probs: probs):
        peer = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), logits=logits)
        with mock.patch("torch.rand", return_value=numbers):
            sample = peer.rsample()
    torch.testing.assert_close(ours, sample)
    assert torch.equal(hard, (sample > 0.5).double())
    (expected,) = torch.autograd.grad((sample * value).sum(), logits)
    for out in (ours, hard):
        (found,) = torch.autograd.grad((out * value).sum(), logits)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steepness", [0.5, 2.0, 25.0])
@pytest.mark.parametrize("slope", ["atan", "fast_sigmoid", "sigmoid"])
def test_e8_surrogates_equal_snntorchs_on_a_grid(slope: str, steepness: float) -> None:
    surrogate = pytest.importorskip("snntorch.surrogate")
    # within what the peer's exp(-kx) can hold
    x = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)
    argument = "alpha" if slope == "atan" else "slope"
    theirs = getattr(surrogate, slope)(**{argument: steepness})
    found = []
    for run in (SpikingNeuron(slope, steepness), theirs):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.sum().backward()
        found.append((out.detach().double(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)


def test_e8_the_triangle_and_the_tails_from_their_formulas() -> None:
    # snntorch's "triangular" is another function (constant on both sides) and its sigmoid nan in the tails
    x = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True)
    SpikingNeuron("triangle", 0.75)(x).sum().backward()
    expected = (1 - 0.75 * x.detach().abs()).clamp(min=0)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    SpikingNeuron("sigmoid", 25.0)(far).sum().backward()
    assert far.grad.tolist() == [0.0, 0.0]


def test_annealing_steepens_the_slope_and_not_the_bits() -> None:
    unit = BinaryNeuron(StraightThrough("sigmoid"))
    for epoch, steepness in ((0, 1.0), (25, 2.0), (1000, 5.0)):
        unit.anneal(epoch)
        assert unit.steepness == steepness
        a = A.clone().requires_grad_()
        torch.manual_seed(3)
        out = unit(a)
        torch.manual_seed(3)
        assert torch.equal(out, BinaryNeuron()(A))
        out.sum().backward()
        s = torch.sigmoid(steepness * A)
        torch.testing.assert_close(a.grad, steepness * s * (1 - s))
    other = BinaryNeuron(StraightThrough("sigmoid"))
    other.load_state_dict(unit.state_dict())
    assert other.steepness == 5
    spike = SpikingNeuron("sigmoid")
    spike.anneal(25)
    assert spike.steepness == 2


@pytest.mark.parametrize("gradient", [StraightThrough(), Concrete(), None], ids=str)
def test_annealing_needs_a_slope(gradient: StraightThrough | Concrete | None) -> None:
    with pytest.raises(UnsupportedError, match=r"anneal: .*slope='sigmoid'"):
        BinaryNeuron(gradient).anneal(1)


def test_annealing_does_not_recompile() -> None:
    unit = BinaryNeuron(StraightThrough("sigmoid"))
    count = CompileCounter()
    compiled = torch.compile(unit, backend=count, fullgraph=True)
    for epoch in range(4):
        unit.anneal(epoch)
        compiled(torch.zeros(3))
    assert count.frame_count == 1


def test_evaluation_of_each_unit() -> None:
    a = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    p = torch.sigmoid(a)
    shut = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(BinaryNeuron(Concrete(hard=False)).eval()(a), shut)
    torch.testing.assert_close(StochasticTimesSmooth().eval()(a), shut * p.sqrt())
    torch.testing.assert_close(NoisyRectifier().eval()(a), torch.relu(a))
    for unit in (BinaryNeuron(), StochasticTimesSmooth(), NoisyRectifier()):
        unit.eval()
        threshold = torch.tensor(0.7)
        assert torch.equal(unit(a, threshold) != 0, a > 0.7)
    assert torch.equal(NoisyRectifier(threshold=-1.0).eval()(a), a + 1)
    assert CategoricalNeuron().eval()(a).tolist() == [0, 0, 0, 1]


def test_reviving_counts_and_nudges_only_the_silent() -> None:
    unit, bias = NoisyRectifier(units=3), torch.zeros(3)
    outputs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    for _ in range(40):
        unit.revive_(bias, outputs, target=0.3, step=0.1)
    torch.testing.assert_close(unit.rate, torch.tensor([0.9**40, 1.0, 0.5 + 0.5 * 0.9**40]))
    late = sum(0.9**k < 0.3 for k in range(1, 41))
    torch.testing.assert_close(bias, torch.tensor([0.1 * late, 0.0, 0.0]))
    with pytest.raises(UnsupportedError, match="units"):
        NoisyRectifier().revive_(bias, outputs)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"bias": torch.zeros(2)}, "bias"),
        ({"bias": [0.0]}, "bias"),
        ({"outputs": torch.zeros(4, 2)}, "outputs"),
        ({"outputs": torch.zeros(0, 3)}, "outputs"),
        ({"target": 1.0}, "target"),
        ({"step": 0.0}, "step"),
        ({"momentum": 1.0}, "momentum"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_reviving_refuses_a_wrong_argument_and_changes_nothing(
    changes: dict[str, object], argument: str
) -> None:
    unit, bias = NoisyRectifier(units=3), torch.zeros(3)
    arguments = {"bias": bias, "outputs": torch.zeros(4, 3), **changes}
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected"):
        unit.revive_(**arguments)
    assert torch.equal(unit.rate, torch.ones(3))
    assert torch.equal(bias, torch.zeros(3))
