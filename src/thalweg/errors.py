"""What every refusal looks like: the argument, what came, what was expected, how to mend it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class _Refusal(Exception):
    def __init__(self, argument: str, got: object, expected: str, mend: str = "") -> None:
        super().__init__(_message(argument, got, expected, mend))
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:
        # a refusal must come back whole from a worker process; what was refused need not travel
        return _again, (type(self), self.args, {"argument": self.argument})


class ArgumentError(_Refusal, ValueError):
    """An argument has the right type and a value, shape or dtype that cannot be used.

    Args:
        argument: name of the argument as the caller wrote it.
        got: what came.
        expected: what would have been accepted.
        mend: one sentence on how to mend it; may be empty.

    Example:
        >>> str(ArgumentError("samples", 0, "an integer of at least 1"))
        'samples: expected an integer of at least 1, got 0'
    """


class ArgumentTypeError(_Refusal, TypeError):
    """An argument has a type that cannot be used; same fields and message as `ArgumentError`."""


class NonFiniteError(ValueError):
    """A loss or a gradient holds nan or infinity where only finite numbers make sense."""


class UnsupportedError(RuntimeError):
    """A transform, a wrapper or a kernel that this piece cannot serve; the message names the way that can."""


class MissingExtraError(ImportError):
    """An optional package is missing; the message says which extra brings it.

    Example:
        >>> str(MissingExtraError("matplotlib", "recipes"))
        "matplotlib is not installed: pip install 'thalweg[recipes]'"
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'thalweg[{extra}]'", name=package)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, {"name": self.name})


def _again(kind: type[Exception], args: tuple[Any, ...], fields: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def _message(argument: str, got: object, expected: str, mend: str) -> str:
    text = f"{argument}: expected {expected}, got {describe(got)}"
    return f"{text}. {mend}" if mend else text


def describe(value: object) -> str:
    """Say what a value is in one line: tensors by shape, dtype and device, the rest by `repr`, shortened.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a tensor of shape (2, 3), torch.float32, cpu'
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def require_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ArgumentError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(argument, value, "one of " + ", ".join(repr(choice) for choice in choices))


def require_integer(argument: str, value: object, least: int) -> None:
    """Raise unless `value` is an `int` (not a `bool`) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(argument, value, f"an integer of at least {least}")
    if value < least:
        raise ArgumentError(argument, value, f"an integer of at least {least}")


def require_positive(argument: str, value: object) -> None:
    """Raise unless `value` is a finite real number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(argument, value, "a finite number above 0")
    if not 0 < value < float("inf"):
        raise ArgumentError(argument, value, "a finite number above 0")


def require_floating(argument: str, value: object) -> Tensor:
    """Raise unless `value` is a real floating-point tensor; return it."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(argument, value, "a floating-point tensor")
    if not value.is_floating_point():
        raise ArgumentTypeError(argument, value, "a floating-point tensor")
    return value


def require_finite(what: str, value: Tensor) -> None:
    """Raise `NonFiniteError` when `value` holds nan or infinity; a tensor without data (fake, meta) passes.

    One device synchronisation: call it at the boundary of a process, not in every operation.
    """
    if not (value.is_floating_point() or value.is_complex()) or without_data(value):
        return
    detached = value.detach()
    # the sum is one cheap pass, and finite only if every term is; it may overflow, so the terms decide
    if not bool(torch.isfinite(detached.sum())) and not bool(torch.isfinite(detached).all()):
        bad = int((~torch.isfinite(detached)).sum())
        raise NonFiniteError(f"{what}: {bad} of {value.numel()} values are nan or infinite")


def without_data(value: Tensor) -> bool:
    """Whether what is computed from a tensor has no data: a fake or meta tensor, or any in a fake mode."""
    return isinstance(value, FakeTensor) or value.is_meta or isinstance(value.detach(), FakeTensor)
