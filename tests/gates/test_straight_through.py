"""Straight-through: exact values, the two slopes, and what it refuses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thalweg import gates
from thalweg.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_hard_value_is_exact_where_adding_and_subtracting_is_not(dtype: torch.dtype) -> None:
    logits = torch.linspace(-300, 300, 1001, dtype=torch.float64).to(dtype)
    hard = torch.linspace(-1, 1, 1001, dtype=torch.float64).to(dtype)
    assert torch.equal(gates.straight_through(logits, hard), hard)
    assert not torch.equal(hard + logits - logits, hard)


def test_infinite_and_nan_logits_do_not_touch_the_value() -> None:
    logits = torch.tensor([math.inf, -math.inf, math.nan], requires_grad=True)
    hard = torch.tensor([1.0, -0.0, 0.0])
    for slope in ("identity", "sigmoid"):
        out = gates.straight_through(logits, hard, slope=slope)
        assert torch.equal(out, hard)
        assert out.signbit().tolist() == [False, True, False]


def test_zeros_are_literal_zeros() -> None:
    logits = torch.randn(1000)
    share = (gates.threshold(logits) == 0).double().mean()
    assert share == (logits <= 0).double().mean()


def test_sigmoid_slope_of_large_logits_is_finite() -> None:
    logits = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    gates.threshold(logits, slope="sigmoid").sum().backward()
    assert logits.grad.tolist() == [0.0, 0.25, 0.0]


def test_sigmoid_slope_is_exact_in_expectation_for_an_affine_loss_and_identity_is_not() -> None:
    logits = torch.tensor([-1.3, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64)
    (exact,) = torch.autograd.grad((torch.sigmoid(logits) * weight).sum(), logits)

    def expected(slope: str) -> Tensor:
        """The estimator's mean by enumeration of the outcomes of each unit; the loss is a sum over units."""
        probability = torch.sigmoid(logits.detach())
        total = torch.zeros_like(logits)
        for bit, chance in ((1.0, probability), (0.0, 1 - probability)):
            out = gates.straight_through(logits, torch.full_like(logits, bit), slope=slope)
            (gradient,) = torch.autograd.grad((out * weight).sum(), logits)
            total = total + chance * gradient
        return total

    torch.testing.assert_close(expected("sigmoid"), exact)
    slope = torch.sigmoid(logits.detach()) * torch.sigmoid(-logits.detach())
    torch.testing.assert_close(expected("identity"), exact / slope)


def test_parity_with_one_hot_categorical_straight_through() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(3)
    peer = torch.distributions.OneHotCategoricalStraightThrough(logits=logits).rsample()
    (expected,) = torch.autograd.grad((peer * weight).sum(), logits)
    ours = gates.straight_through(torch.softmax(logits, -1), peer.detach())
    (gradient,) = torch.autograd.grad((ours * weight).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_the_hard_value_gets_no_gradient() -> None:
    logits, hard = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    gates.straight_through(logits, hard).sum().backward()
    assert hard.grad is None
    assert logits.grad.tolist() == [1, 1, 1]


def test_only_one_of_the_two_mapped() -> None:
    logits, hard = torch.randn(3), torch.randn(4, 3)
    out = torch.vmap(lambda h: gates.straight_through(logits, h))(hard)
    assert torch.equal(out, hard)
    out = torch.vmap(lambda one: gates.straight_through(one, logits))(hard)
    assert torch.equal(out, logits.expand(4, 3))


SURROGATES = ("sigmoid", "atan", "fast_sigmoid", "triangle")


@pytest.mark.parametrize("slope", SURROGATES)
@pytest.mark.parametrize("steepness", [0.5, 25, torch.tensor(3.0)], ids=["flat", "steep", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_surrogates_are_finite_and_keep_the_dtype_wherever_they_are_asked(
    slope: str, steepness: float | Tensor, dtype: torch.dtype
) -> None:
    points = [-math.inf, -1e30, -300.0, -0.2, -0.0, 0.0, 0.2, 300.0, 1e30, math.inf]
    for shape in ((10,), (5, 2)):
        x = torch.tensor(points, dtype=dtype).reshape(shape).requires_grad_()
        gates.threshold(x, slope, steepness).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.dtype == dtype
        assert (x.grad >= 0).all()
        eps = 25 * torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad, x.grad.flip(*range(x.ndim)), rtol=0, atol=eps)
    alone = torch.zeros((), dtype=dtype, requires_grad=True)
    gates.threshold(alone, slope, steepness).backward()
    assert alone.grad.dtype == dtype


@pytest.mark.parametrize("slope", SURROGATES)
def test_surrogates_have_no_cancellation_in_the_lower_tail(slope: str) -> None:
    x = torch.linspace(-40, 0, 200, requires_grad=True)
    gates.threshold(x, slope, 2.0).sum().backward()
    wide = x.detach().double().requires_grad_()
    gates.threshold(wide, slope, 2.0).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    "steepness", [0, -1.0, math.nan, math.inf, True, "2", torch.ones(2), torch.ones(1, dtype=torch.int64)]
)
def test_a_steepness_that_is_none_is_refused(steepness: object) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^steepness: expected"):
        gates.threshold(torch.zeros(2), "sigmoid", steepness)


@pytest.mark.parametrize(
    ("logits", "hard", "slope", "named"),
    [
        (torch.zeros(2), torch.zeros(3), "identity", "hard"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "identity", "hard"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "identity", "hard"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bool), "identity", "hard"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), "identity", "logits"),
        (1.0, torch.zeros(2), "identity", "logits"),
        (torch.zeros(2), torch.zeros(2), "tanh", "slope"),
    ],
)
def test_refuses_a_wrong_argument_by_name(logits: object, hard: object, slope: str, named: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as refusal:
        gates.straight_through(logits, hard, slope=slope)
    assert refusal.value.argument == named


@pytest.mark.parametrize("call", [gates.round, gates.sign, gates.threshold])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_is_no_decision(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    out = call(torch.tensor([float("nan"), 1.0, float("inf")], dtype=dtype))
    assert out.dtype == dtype
    assert out.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("call", [gates.round, gates.sign, gates.threshold])
def test_the_ready_made_ones_refuse_integers(call: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ArgumentTypeError, match="floating-point tensor"):
        call(torch.zeros(2, dtype=torch.int64))
