"""The fixed point of a function, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from thalweg.equilibria.convergence import (
    MEND,
    Status,
    iterate,
    judge,
    refuse_policy,
    require_limits,
    require_no_transform,
    require_status,
)
from thalweg.equilibria.implicit import Implicit, OneStep, attached
from thalweg.equilibria.linear import anderson
from thalweg.equilibria.nudged import Nudged
from thalweg.equilibria.state import State, require_same, taken_apart
from thalweg.errors import ArgumentTypeError, require_choice, require_finite
from thalweg.step import Backprop

_ACCEPTED = "Backprop(), Implicit(...) or OneStep()"


def fixed_point(
    function: Callable[[Any], Any],
    start: Any,
    *,
    gradient: Backprop | Implicit | OneStep | None = None,
    tolerance: float | None = 1e-5,
    max_steps: int = 200,
    solver: Literal["iterate", "anderson"] = "iterate",
    strict: bool = True,
    status: Status | None = None,
) -> Any:
    """Repeat z = f(z) until it rests, and choose how the rest state is differentiated.

    Gradients reach the parameters and whatever else the function closes over, in any place.

    | gradient | choose it | kept for backward | the gradient is | twice |
    | --- | --- | --- | --- | --- |
    | `Implicit(...)` | first | one step | exact at the rest state | refused |
    | `Backprop()` | to compare, or a second derivative | every step | exact for the steps taken | yes |
    | `OneStep()` | the step contracts strongly | one step | biased | refused |

    `Backprop()` with `tolerance=None` is a plain loop and supports what the function does (`torch.func.grad`,
    `vmap`, `jvp`, compilation). The others refuse `torch.func` transforms by name. All support autocast.

    `thalweg.price`, which has no values to judge by, counts `max_steps` of forward and solve (of "gmres" one
    cycle).

    Args:
        function: f(z) returns a state like its argument, without changing it in place.
        start: z0: a tensor, or tensors in tuples, lists and dicts. Where each part has a first dimension and
            another beside it, that dimension counts examples, and each is judged by itself.
        gradient: None for `Implicit()`.
        tolerance: the rest state is found when a step moves no example by more than this, relative to one
            plus its norm; above 0. None takes exactly `max_steps`, without looking.
        max_steps: at least 1.
        solver: "iterate" is the plain loop; "anderson" mixes the last five steps and needs fewer, under
            `Implicit` and `OneStep` only.
        strict: raise when `max_steps` did not suffice; False warns.
        status: gets the number of steps and the residuals of forward and backward.

    Returns:
        The rest state, nested like `start`.

    Raises:
        ConvergenceError: no rest within `max_steps`, or no solution of the adjoint equation.
        NonFiniteError: the state became nan or infinite.
        ArgumentError, ArgumentTypeError: a wrong argument, or a policy that is none of the three.

    Example:
        >>> cell = torch.nn.Linear(3, 3)
        >>> x = torch.randn(8, 3)
        >>> z = fixed_point(lambda z: torch.tanh(0.5 * cell(z) + x), torch.zeros(8, 3), gradient=Implicit())
        >>> z.square().mean().backward()
        >>> cell.weight.grad.shape
        torch.Size([3, 3])
    """
    if not callable(function):
        raise ArgumentTypeError("function", function, "a function of the state")
    policy = Implicit() if gradient is None else gradient
    if not isinstance(policy, Backprop | Implicit | OneStep):
        mend = "It needs an energy: minimize(energy, ...)." if isinstance(policy, Nudged) else ""
        refuse_policy("fixed_point", policy, _ACCEPTED, mend)
    require_limits(tolerance, max_steps)
    require_choice("solver", solver, ("iterate", "anderson"))
    if solver == "anderson" and isinstance(policy, Backprop):
        refuse_policy("fixed_point(solver='anderson')", policy, "Implicit(...) or OneStep()")
    require_status(status)
    if not isinstance(policy, Backprop) or tolerance is not None:
        mend = "Use gradient=Backprop() with tolerance=None."
        require_no_transform(f"fixed_point with {type(policy).__name__}", mend)
    parts, together = taken_apart("start", start)

    def step(state: State) -> State:
        return require_same("function", function(together(state)), state, together)

    return together(settle(step, parts, policy, tolerance, max_steps, solver, strict, status, "fixed_point"))


def settle(
    step: Callable[[State], State],
    start: State,
    policy: Backprop | Implicit | OneStep,
    tolerance: float | None,
    max_steps: int,
    solver: str,
    strict: bool,
    status: Status | None,
    what: str,
) -> State:
    """Bring a step to rest and attach the rest state, under a policy that needs nothing but the step."""
    if isinstance(policy, Backprop):
        found = iterate(step, start, tolerance, max_steps, what, status is not None)
    else:
        with torch.no_grad():
            first = tuple(part.detach() for part in start)
            if solver == "anderson":
                found = anderson(step, first, tolerance, max_steps, what)
            else:
                found = iterate(step, first, tolerance, max_steps, what, status is not None)
    if status is not None:
        status.iterations, status.residual = found.iterations, found.residual
    if torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling():
        for part in found.state:
            require_finite(f"{what}: the rest state", part)
    judge(found, tolerance, what, strict, MEND)
    if isinstance(policy, Backprop) or not torch.is_grad_enabled():
        return found.state
    return attached(step, found.state, policy, status)
