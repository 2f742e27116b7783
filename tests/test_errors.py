"""What every refusal looks like."""

import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from thalweg import errors
from thalweg.errors import ArgumentError, ArgumentTypeError, MissingExtraError, NonFiniteError


def test_a_message_says_argument_got_expected_and_how_to_mend() -> None:
    for kind, base in ((ArgumentError, ValueError), (ArgumentTypeError, TypeError)):
        error = kind("samples", torch.zeros(2), "an integer", "Write 3.")
        assert isinstance(error, base)
        assert error.argument == "samples"
        got = "a tensor of shape (2,), torch.float32, cpu"
        assert str(error) == f"samples: expected an integer, got {got}. Write 3."


def test_refusals_survive_the_way_back_from_a_worker() -> None:
    for error in (
        ArgumentError("samples", 0, "an integer", "Write 3."),
        ArgumentTypeError("samples", None, "an integer"),
        MissingExtraError("matplotlib", "recipes"),
        NonFiniteError("nan"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)


def test_describe_is_one_short_line() -> None:
    assert errors.describe(int) == "the class int"
    assert errors.describe(torch.zeros(2, dtype=torch.int64)) == "a tensor of shape (2,), torch.int64, cpu"
    assert errors.describe(torch.nn.Sequential(torch.nn.ReLU())) == "Sequential( (0): ReLU() )"
    assert errors.describe("x" * 500).endswith("...")
    assert len(errors.describe("x" * 500)) == 120


def test_choice() -> None:
    errors.require_choice("norm", "l2", ("inf", "l2"))
    for wrong in ("l1", 2, None, [], ("inf",)):
        with pytest.raises(ArgumentError, match="one of 'inf', 'l2'"):
            errors.require_choice("norm", wrong, ("inf", "l2"))


def test_integer() -> None:
    errors.require_integer("samples", 1, 1)
    with pytest.raises(ArgumentError, match="at least 1, got 0"):
        errors.require_integer("samples", 0, 1)
    for wrong in (1.0, True, "1", None, torch.tensor(1)):
        with pytest.raises(ArgumentTypeError, match="samples"):
            errors.require_integer("samples", wrong, 1)


def test_positive() -> None:
    errors.require_positive("sigma", 1e-300)
    for wrong in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match="sigma"):
            errors.require_positive("sigma", wrong)
    for wrong in ("1", True, None, torch.tensor(1.0)):
        with pytest.raises(ArgumentTypeError, match="sigma"):
            errors.require_positive("sigma", wrong)


def test_floating() -> None:
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert errors.require_floating("x", x) is x
    for wrong in (1.0, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(ArgumentTypeError, match="x: expected a floating-point tensor"):
            errors.require_floating("x", wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite(bad: float) -> None:
    errors.require_finite("the loss", torch.ones(3))
    errors.require_finite("the loss", torch.ones(3, dtype=torch.int64))
    errors.require_finite("the loss", torch.full((2,), bad, device="meta"))
    with FakeTensorMode():
        errors.require_finite("the loss", torch.full((2,), bad))
    with pytest.raises(NonFiniteError, match="the loss: 2 of 3 values are nan or infinite"):
        errors.require_finite("the loss", torch.tensor([bad, 1.0, bad], requires_grad=True))
