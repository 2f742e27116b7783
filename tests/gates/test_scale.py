"""Scale, reverse and stop: what the matrix does not say, and what they refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from thalweg import gates
from thalweg.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: gates.scale(x, math.inf), "factor"),
        (lambda x: gates.scale(x, "0.5"), "factor"),
        (lambda x: gates.scale(x, True), "factor"),
        (lambda x: gates.scale(x, torch.ones(2)), "factor"),
        (lambda x: gates.scale(x, torch.ones((), dtype=torch.int64)), "factor"),
        (lambda x: gates.scale([x], 1.0), "x"),
        (lambda x: gates.reverse(x, math.nan), "strength"),
        (lambda x: gates.reverse(x.long()), "x"),
        (lambda x: gates.stop(x, 1.5), "fraction"),
        (lambda x: gates.stop(x, -0.1), "fraction"),
        (lambda x: gates.stop(x, math.nan), "fraction"),
        (lambda x: gates.stop(x, None), "fraction"),
        (lambda x: gates.stop([x]), "x"),
    ],
)
def test_refuses_a_wrong_argument_by_name(call: Callable[[Tensor], Tensor], named: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError)) as refusal:
        call(torch.zeros(2))
    assert refusal.value.argument == named


def test_stop_lets_nothing_through_and_leaves_no_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    below = torch.ones(2, requires_grad=True)
    (gates.stop(x * below) * x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]
    assert below.grad is None
    assert gates.stop(x).data_ptr() == x.data_ptr()


def test_a_factor_in_a_tensor_is_a_schedule_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, f: gates.scale(x, f).sum(), fullgraph=True, backend=counter)
    for value in (0.25, 0.5, -2.0):
        x = torch.ones(2, requires_grad=True)
        compiled(x, torch.tensor(value)).backward()
        assert x.grad.tolist() == [value, value]
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_factor_of_another_precision_does_not_widen() -> None:
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    out = gates.scale(x, torch.tensor(0.5, dtype=torch.float64))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.tolist() == [0.5, 0.5]


def test_a_factor_does_not_widen_a_tensor_without_dimensions_or_one_mapped() -> None:
    factor = torch.tensor(0.5, dtype=torch.float64)
    x = torch.tensor(3.0, dtype=torch.bfloat16, requires_grad=True)
    assert gates.scale(x, factor).dtype == torch.bfloat16
    mapped = torch.vmap(torch.func.grad(lambda each: gates.scale(each, factor)))(torch.ones(2))
    assert mapped.dtype == torch.float32
    assert mapped.tolist() == [0.5, 0.5]


def test_nothing_of_the_size_of_the_tensor_is_kept_for_backward() -> None:
    kept = []
    x = torch.ones(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gates.clip(gates.reverse(gates.scale(x, torch.tensor(0.5)), 2.0), 1.0, dim=0)
        gates.round(x)
    assert sum(kept) < x.numel()


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75])
def test_stop_lets_the_rest_of_a_fraction_through(fraction: float) -> None:
    x = torch.ones(2, requires_grad=True)
    gates.stop(x, fraction).sum().backward()
    assert x.grad.tolist() == [1 - fraction] * 2
