"""Every unit that needs only the upstream gradient, under every transform that its docstring promises."""

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

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
)

UNITS: dict[str, Callable[[], nn.Module]] = {
    "straight-through": BinaryNeuron,
    "straight-through, atan": lambda: BinaryNeuron(StraightThrough("atan")),
    "straight-through, annealed": lambda: annealed(BinaryNeuron(StraightThrough("sigmoid"))),
    "concrete": lambda: BinaryNeuron(Concrete(0.7, hard=False)),
    "gumbel": lambda: BinaryNeuron(Concrete(0.7)),
    "rectifier": NoisyRectifier,
    "rectifier, logistic": lambda: NoisyRectifier("logistic", scale=0.5, units=6),
    "times smooth": StochasticTimesSmooth,
    "times smooth, scaled": lambda: StochasticTimesSmooth(scale=2.0, exponent=0.3),
    "spike": lambda: SpikingNeuron("fast_sigmoid", steepness=3.0, threshold=0.2),
    "reinmax": CategoricalNeuron,
    "category, identity": lambda: CategoricalNeuron(StraightThrough()),
    "category, softmax": lambda: CategoricalNeuron(StraightThrough("softmax")),
    "category, gumbel": lambda: CategoricalNeuron(StraightThroughGumbel(0.7)),
}
each = pytest.mark.parametrize("name", UNITS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def annealed(unit: BinaryNeuron) -> BinaryNeuron:
    unit.anneal(30)
    return unit


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def pulled(run: Callable[[Tensor], Tensor], a: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient under the seed that every run of a test shares."""
    leaf = a.clone().requires_grad_()
    torch.manual_seed(7)
    out = run(leaf)
    (gradient,) = torch.autograd.grad((out * weights).sum(), leaf)
    return out.detach(), gradient


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)


@each
@pytest.mark.parametrize("reentrant", [False, True])
def test_bits_are_the_same_under_checkpoint(name: str, reentrant: bool) -> None:
    a, weights = data()
    unit, seen = UNITS[name](), []

    def body(x: Tensor) -> Tensor:
        seen.append(unit(x))
        return torch.tanh(seen[-1])

    leaf = a.clone().requires_grad_()
    torch.manual_seed(7)
    (checkpoint(body, leaf, use_reentrant=reentrant) * weights).sum().backward()
    out, gradient = pulled(lambda x: torch.tanh(unit(x)), a, weights)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(torch.tanh(seen[0]), out)
    assert torch.equal(leaf.grad, gradient)


@each
@modes
def test_bits_are_the_same_compiled(name: str, training: bool) -> None:
    a, weights = data(torch.float32)
    unit = UNITS[name]().train(training)
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    for plain, found in zip(pulled(unit, a, weights), pulled(compiled, a, weights)):
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    torch.manual_seed(7)
    hard = unit(a) == 0
    torch.manual_seed(7)
    assert torch.equal(compiled(a) == 0, hard)


@each
def test_bits_are_the_same_under_double_backward(name: str) -> None:
    """The graph of the gradient holds the outcomes of the forward: no second draw."""
    a, weights = data()
    unit = UNITS[name]()
    leaf = a.clone().requires_grad_()
    torch.manual_seed(7)
    out = unit(leaf)
    state = torch.get_rng_state()
    (first,) = torch.autograd.grad((out**2 * weights).sum(), leaf, create_graph=True)
    if first.requires_grad:
        torch.autograd.grad(first.sum(), leaf)
    assert torch.equal(torch.get_rng_state(), state)
    _, expected = pulled(lambda x: unit(x), a, 2 * out.detach() * weights)
    torch.testing.assert_close(first.detach(), expected)


@each
def test_second_derivatives_are_those_of_the_first(name: str) -> None:
    a, weights = data()
    unit = UNITS[name]()

    def slope(x: Tensor) -> Tensor:
        return pulled_graph(unit, x, weights)

    leaf = a.clone().requires_grad_()
    if not slope(leaf).requires_grad:
        return
    (second,) = torch.autograd.grad(slope(leaf).sum(), leaf)
    step = 1e-6
    outs = [slope((a + sign * step).requires_grad_()).detach() for sign in (1, -1)]
    values = [fixed(unit, a + sign * step) == 0 for sign in (1, -1)]
    if not torch.equal(values[0], values[1]):
        pytest.fail("a decision flipped within the step: choose another seed")
    numeric = (outs[0] - outs[1]).sum() / (2 * step)
    torch.testing.assert_close(second.sum(), numeric, rtol=1e-5, atol=1e-6)


def pulled_graph(unit: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((fixed(unit, x) * weights).sum(), x, create_graph=True)[0]


def fixed(unit: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return unit(x)


@each
def test_vmap_and_grad_in_either_order(name: str) -> None:
    a, weights = data()
    unit = UNITS[name]()
    _, expected = pulled(unit, a, weights)
    torch.manual_seed(7)
    mapped = torch.vmap(unit, randomness="different")(a)
    torch.testing.assert_close(mapped, fixed(unit, a))

    def loss(one: Tensor, each: Tensor) -> Tensor:
        return (unit(one) * each).sum()

    torch.manual_seed(7)
    inside = torch.vmap(torch.func.grad(loss), randomness="different")(a, weights)
    torch.testing.assert_close(inside, expected)
    torch.manual_seed(7)
    outside = torch.func.grad(lambda x: torch.vmap(loss, randomness="different")(x, weights).sum())(a)
    torch.testing.assert_close(outside, expected)


@each
@modes
def test_forward_mode_agrees_with_backward(name: str, training: bool) -> None:
    a, weights = data()
    tangent = torch.randn_like(a)
    unit = UNITS[name]().train(training)
    _, gradient = pulled(unit, a, weights)
    torch.manual_seed(7)
    _, moved = torch.func.jvp(unit, (a,), (tangent,))
    torch.testing.assert_close((moved * weights).sum(), (gradient * tangent).sum())


@each
def test_autocast(name: str) -> None:
    layer, unit = nn.Linear(4, 6), UNITS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        out = unit(layer(torch.randn(3, 4)))
    out.float().square().sum().backward()
    assert out.dtype in (torch.bfloat16, torch.float32)
    assert torch.isfinite(layer.weight.grad).all()


@each
def test_fake_tensors_pass(name: str) -> None:
    with FakeTensorMode():
        unit, a = UNITS[name](), torch.zeros(3, 6, requires_grad=True)
        unit(a).sum().backward()
        assert a.grad.shape == a.shape


@each
@modes
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_give_finite_values_and_gradients_in_every_dtype(
    name: str, training: bool, dtype: torch.dtype
) -> None:
    unit = UNITS[name]().train(training)
    extreme = torch.tensor([[-3e4, -90.0, -20.0, 20.0, 90.0, 3e4]], dtype=dtype, requires_grad=True)
    out = unit(extreme)
    (gradient,) = torch.autograd.grad(out.sum(), extreme)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert torch.isfinite(gradient).all()
    a = torch.randn(20, 6, dtype=dtype)
    assert torch.isfinite(unit(a)).all()


@each
@modes
def test_a_nan_comes_out_as_nan(name: str, training: bool) -> None:
    a = torch.zeros(2, 6)
    a[1, 2] = torch.nan
    out = UNITS[name]().train(training)(a)
    assert out[0].isfinite().all()
    assert out[1, 2].isnan()


@each
def test_evaluation_draws_nothing(name: str) -> None:
    state = torch.get_rng_state()
    UNITS[name]().eval()(torch.zeros(3, 6))
    assert torch.equal(torch.get_rng_state(), state)


@each
@modes
def test_e10_forward_output_contains_literal_zeros(name: str, training: bool) -> None:
    a = torch.randn(400, 6)
    out = UNITS[name]().train(training)(a)
    if name == "concrete" and training:
        # the relaxation promises none
        assert not (out == 0).any()
        return
    share = (out == 0).double().mean()
    assert 0.2 < share < 0.9
    assert not (out.abs() < 1e-3).logical_and(out != 0).any() or "rectifier" in name


@pytest.mark.parametrize("name", ["straight-through", "gumbel", "concrete"])
def test_the_same_key_gives_the_same_decision_whatever_the_gradient(name: str) -> None:
    a = torch.randn(10_000, dtype=torch.float64)
    assert torch.equal(fixed(UNITS[name](), a) > 0.5, fixed(BinaryNeuron(), a) > 0.5)


@each
@hypothesis.given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
)
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_shape_and_dtype(name: str, shape: list[int], dtype: torch.dtype, training: bool) -> None:
    out = UNITS[name]().train(training)(torch.randn(shape, dtype=dtype))
    assert out.shape == torch.Size(shape)
    assert out.dtype == dtype


@each
@modes
def test_a_batch_without_examples(name: str, training: bool) -> None:
    assert UNITS[name]().train(training)(torch.zeros(0, 6)).shape == (0, 6)


@each
def test_refuses_what_is_not_floating_point(name: str) -> None:
    for wrong in (torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.complex64), [1.0]):
        with pytest.raises(TypeError, match=r"^(logits|potential): expected a floating-point tensor"):
            UNITS[name]()(wrong)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: BinaryNeuron(StraightThrough("softmax")), "gradient"),
        (lambda: BinaryNeuron(ReinMax()), "gradient"),
        (lambda: Concrete(0.0), "temperature"),
        (lambda: Concrete("1"), "temperature"),
        (lambda: Concrete(hard=1), "hard"),
        (lambda: BinaryNeuron(StraightThrough("sigmoid")).anneal(-1), "epoch"),
        (lambda: BinaryNeuron(StraightThrough("sigmoid")).anneal("1"), "epoch"),
        (lambda: BinaryNeuron(StraightThrough("sigmoid")).anneal(1, rate=float("nan")), "rate"),
        (lambda: BinaryNeuron(StraightThrough("sigmoid")).anneal(1, limit=0), "limit"),
        (lambda: NoisyRectifier("uniform"), "noise"),
        (lambda: NoisyRectifier(scale=-1.0), "scale"),
        (lambda: NoisyRectifier(threshold=float("nan")), "threshold"),
        (lambda: NoisyRectifier(units=0), "units"),
        (lambda: StochasticTimesSmooth(scale=0.0), "scale"),
        (lambda: StochasticTimesSmooth(exponent=1.0), "exponent"),
        (lambda: StochasticTimesSmooth(exponent="half"), "exponent"),
        (lambda: StochasticTimesSmooth(threshold="0"), "threshold"),
        (lambda: SpikingNeuron("step"), "slope"),
        (lambda: SpikingNeuron("softmax"), "slope"),
        (lambda: SpikingNeuron(steepness=0.0), "steepness"),
        (lambda: SpikingNeuron(threshold=float("nan")), "threshold"),
        (lambda: CategoricalNeuron(None), "gradient"),
        (lambda: CategoricalNeuron(StraightThrough("sigmoid")), "gradient"),
        (lambda: CategoricalNeuron(Concrete()), "gradient"),
        (lambda: CategoricalNeuron()(torch.zeros(())), "logits"),
        (lambda: CategoricalNeuron()(torch.zeros(3, 0)), "logits"),
        (lambda: StraightThroughGumbel(0.0), "temperature"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], object], argument: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected"):
        call()
