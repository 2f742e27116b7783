"""Whether something came to rest: what is reported, and how it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from thalweg.equilibria.state import State, moved, without_data
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, require_integer, require_positive

MEND = "More max_steps, a larger tolerance, or tolerance=None to take what max_steps give, unjudged."


class ConvergenceError(RuntimeError):
    """Something did not come to rest within its steps; the message carries the residual."""


class ConvergenceWarning(RuntimeWarning):
    """The same under `strict=False`."""


@dataclass(slots=True, eq=False)
class Status:
    """What a search for an equilibrium reports: pass one as `status=`, and read it afterwards.

    Attributes:
        iterations: steps of the forward.
        residual: how far the last step moved each example, relative to one plus its norm; shape (examples,).
            A state whose parts do not all have a first dimension and another beside it is one example.
        adjoint_iterations: steps of the backward: of the linear solve, or of the nudged relaxations together.
        adjoint_residual: the same for the last backward, shape (examples,), or None before it.

    Example:
        >>> import torch
        >>> from thalweg.equilibria import fixed_point
        >>> status = Status()
        >>> z = fixed_point(torch.cos, torch.ones(1), status=status)
        >>> 5 < status.iterations < 50, bool(status.residual < 1e-5)
        (True, True)
    """

    iterations: int = 0
    residual: Tensor | None = None
    adjoint_iterations: int = 0
    adjoint_residual: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where an iteration ended.

    Args:
        state: the last state.
        iterations: steps taken.
        residual: how far the last step moved each example, or None where nobody asked.
        converged: False where a tolerance was given and not met.
    """

    state: State
    iterations: int
    residual: Tensor | None
    converged: bool


def require_limits(tolerance: object, max_steps: object) -> None:
    """Raise unless the tolerance is None or above 0 and the number of steps at least 1."""
    if tolerance is not None:
        require_positive("tolerance", tolerance)
    require_integer("max_steps", max_steps, 1)


def require_status(status: object) -> None:
    """Raise unless `status` is a `Status` or None."""
    if status is not None and not isinstance(status, Status):
        raise ArgumentTypeError("status", status, "a thalweg.equilibria.Status or None")


def iterate(
    step: Callable[[State], State],
    state: State,
    tolerance: float | None,
    max_steps: int,
    what: str,
    measured: bool = False,
) -> Found:
    """Repeat a step until no example moves by more than the tolerance; None takes exactly `max_steps`.

    Args:
        what: what is iterated, for messages.
        measured: measure the residual of the last step also without a tolerance.

    Raises:
        NonFiniteError: a state became nan or infinite.
    """
    residual = None
    for count in range(1, max_steps + 1):
        following = step(state)
        if tolerance is not None or (measured and count == max_steps):
            residual = moved(state, following)
        state = following
        if tolerance is not None and residual is not None and settled(residual, tolerance, what, count):
            return Found(state, count, residual, True)
    return Found(state, max_steps, residual, tolerance is None or without_data(state))


def settled(residual: Tensor, tolerance: float, what: str, count: int) -> bool:
    """Whether every example is within the tolerance; one device synchronisation.

    Raises:
        NonFiniteError: a residual is nan or infinite.
    """
    if without_data((residual,)):
        return False
    worst = float(residual.max())
    if not worst < float("inf"):
        mend = "It diverges: take smaller steps, or see that it is a contraction"
        raise NonFiniteError(f"{what}: the state is nan or infinite after {count} steps. {mend}")
    return worst <= tolerance


def judge(found: Found, tolerance: float | None, what: str, strict: bool, mend: str) -> None:
    """Refuse what did not come to rest, or warn of it.

    Raises:
        ConvergenceError: under `strict`.
    """
    if found.converged:
        return
    assert found.residual is not None
    assert tolerance is not None
    behind = int((found.residual > tolerance).sum())
    text = (
        f"{what} did not converge: residual {float(found.residual.max()):.3g} above the tolerance "
        f"{tolerance:.3g} after {found.iterations} steps, in {behind} of {len(found.residual)} examples. "
        + mend
    )
    if strict:
        raise ConvergenceError(text)
    warnings.warn(text, ConvergenceWarning, stacklevel=4)


def require_no_transform(what: str, mend: str) -> None:
    """Raise inside a `torch.func` transform, which differentiating by hand inside cannot serve."""
    import torch

    from thalweg.errors import UnsupportedError

    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            f"{what} inside a torch.func transform: what it differentiates by itself cannot be transformed. "
            + mend
        )


def refuse_policy(function: str, gradient: object, accepted: str, mend: str = "") -> None:
    """Raise because a policy is none that the function accepts."""
    if isinstance(gradient, type):
        raise ArgumentTypeError("gradient", gradient, accepted, f"Make one: {gradient.__name__}().")
    raise ArgumentError("gradient", gradient, f"for {function}: {accepted}", mend)
