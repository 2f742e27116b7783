"""Solving an ordinary differential equation, with the way its gradient is computed as one keyword."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    UnsupportedError,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.rollouts.adaptive import Tolerances
from thalweg.rollouts.backsolve import Backsolve
from thalweg.rollouts.checkpointed import Checkpointed
from thalweg.rollouts.discrete import Discrete
from thalweg.rollouts.fixed_steps import Method, plain_values
from thalweg.rollouts.ode_problem import Problem, swept
from thalweg.rollouts.reversible import Reversible
from thalweg.rollouts.tableaus import DOPRI5, EULER, HEUN, RK4, State, Tableau
from thalweg.step import Backprop

S = TypeVar("S", Tensor, tuple[Tensor, ...])
Policy = Backprop | Checkpointed | Discrete | Backsolve | Reversible

METHODS: dict[str, Method] = {
    "euler": EULER,
    "heun": HEUN,
    "rk4": RK4,
    "dopri5": DOPRI5,
    "adams_bashforth_2": "adams_bashforth_2",
    "reversible_heun": "reversible_heun",
}


def integrate(
    field: Callable[[S, Tensor], S],
    state: S,
    times: Tensor,
    *,
    method: str | Tableau = "euler",
    gradient: Policy | None = None,
    steps_between: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> S:
    """Solve dx/dt = field(x, t) and return the state at each of some times.

    Choose the method by accuracy per evaluation, and `gradient` by what fits; all but `Backsolve` give the
    exact gradient of the solve. Gradients reach the initial state and every tensor that the field closes
    over, parameters or results of earlier operations, without being named; `times` too under `Backprop` and
    `Checkpointed` with fixed steps.

    Under `Backprop` and `Checkpointed` the solve supports what plain PyTorch supports, second derivatives
    included, and under `Backprop` `torch.func` transforms as well. `Discrete`, `Backsolve` and `Reversible`
    are differentiable once: a second derivative and `torch.func` transforms are refused. They work under
    autocast; a field that draws random numbers is replayed by `Discrete` with fixed steps and else refused,
    and batch norm in training mode is refused.

    Args:
        field: `field(x, t)`, the slope of the state: shaped as the state, a tensor or a tuple. `t` is a
            0-dim tensor on the device and in the dtype of the (first) state.
        state: the initial state at `times[0]`: a floating-point tensor, or a tuple of them.
        times: when the state is wanted, shape (n,) with n >= 2, strictly increasing or decreasing; the
            first is the start. Fixed steps lie between them; "dopri5" interpolates.
        method: "euler" (order 1), "heun", "adams_bashforth_2", "reversible_heun" (2), "rk4" (4), "dopri5"
            (5, chooses its steps), or a `Tableau` of your own.
        gradient: `Backprop()` (the default) keeps everything; `Checkpointed(...)` some states; `Discrete()`
            all states; `Reversible()` (for "reversible_heun" alone) none; `Backsolve(...)` solves the
            adjoint equation.
        steps_between: fixed steps per interval of `times`, at least 1 (the default).
        rtol: for "dopri5", the relative error allowed in one step; default 1e-5.
        atol: for "dopri5", the absolute error allowed in one step; default 1e-6.

    Returns:
        The states, shape (n, *state.shape), the initial one first; a tuple for a tuple.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, a policy the method has no sweep for, or a field
            that returns something else than a slope.
        NonFiniteError: a state is nan or infinite.
        UnsupportedError: a policy cannot serve what the field does; the message names one that can.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> path = integrate(lambda x, t: -x, x, torch.linspace(0, 1, 11), method="rk4", gradient=Discrete())
        >>> path.shape
        torch.Size([11, 2])
        >>> path[-1].sum().backward()
        >>> bool(torch.allclose(x.grad, torch.tensor(-1.0).exp(), atol=1e-6))
        True
    """
    solver = _solver(method)
    policy = Backprop() if gradient is None else gradient
    single = isinstance(state, Tensor)
    start = _check_state(state)
    _check_times(times, start)
    chooses = isinstance(solver, Tableau) and bool(solver.error)
    _check_policy(policy, solver, chooses, times)
    every = _check_steps(steps_between, chooses)
    tolerances = _check_tolerances(rtol, atol, chooses)
    if start[0].is_meta or isinstance(start[0], FakeTensor):
        _refuse_without_values(chooses, method)
    problem = Problem(_on_tuples(field, start, single), start, times, solver, every, tolerances)
    if isinstance(policy, Backprop) or not torch.is_grad_enabled():
        found = problem.outputs(problem.field)
    elif isinstance(policy, Checkpointed):
        found = problem.checkpointed(policy)
    else:
        found = swept(problem, policy)
    _require_finite_states(found, times)
    return found[0] if single else found  # type: ignore[return-value]


def _on_tuples(field: Any, start: State, single: bool) -> Callable[[State, Tensor], State]:
    """The field on tuples, with what it returns checked."""
    if not callable(field):
        raise ArgumentTypeError("field", field, "a function field(x, t) that returns the slope of x")

    def on_tuples(state: State, time: Tensor) -> State:
        slope = field(state[0] if single else state, time)
        slopes = (slope,) if single else slope
        if not isinstance(slopes, tuple | list) or len(slopes) != len(start):
            raise ArgumentTypeError("field", slope, f"a tuple of {len(start)} tensors, shaped as the state")
        for part, wanted in zip(slopes, start):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                raise ArgumentTypeError("field", part, "a floating-point tensor as its return value")
            if part.shape != wanted.shape:
                raise ArgumentError("field", part, f"a slope of the state's shape {tuple(wanted.shape)}")
        return tuple(part.to(wanted.dtype) for part, wanted in zip(slopes, start))

    return on_tuples


def _solver(method: object) -> Method:
    if isinstance(method, Tableau):
        return method
    if not isinstance(method, str):
        raise ArgumentTypeError("method", method, "the name of a method, or a Tableau")
    if method not in METHODS:
        raise ArgumentError("method", method, "one of " + ", ".join(map(repr, METHODS)) + ", or a Tableau")
    return METHODS[method]


def _check_state(state: Any) -> State:
    parts = (state,) if isinstance(state, Tensor) else state
    if not isinstance(parts, tuple) or not parts:
        raise ArgumentTypeError("state", state, "a floating-point tensor, or a tuple of them")
    for index, part in enumerate(parts):
        require_floating("state" if isinstance(state, Tensor) else f"state[{index}]", part)
        if part.device != parts[0].device:
            raise ArgumentError(f"state[{index}]", part, f"all parts on one device, {parts[0].device}")
    return parts


def _check_times(times: object, start: State) -> None:
    require_floating("times", times)
    assert isinstance(times, Tensor)
    if times.ndim != 1 or len(times) < 2:
        raise ArgumentError("times", times, "at least 2 times, shape (n,)")
    if times.device != start[0].device:
        raise ArgumentError("times", times, f"times on the state's device, {start[0].device}")
    values = plain_values(times.detach() if times.requires_grad else times)
    if values is None:
        return
    if not all(map(isfinite, values)):
        raise NonFiniteError("times: holds nan or infinity")
    increasing = [b > a for a, b in pairwise(values)]
    if any(increasing) != all(increasing) or len(set(values)) < len(values):
        raise ArgumentError("times", values, "strictly increasing or strictly decreasing times")


def _check_policy(policy: object, solver: Method, chooses: bool, times: Tensor) -> None:
    name = type(policy).__name__
    if isinstance(policy, type) or not isinstance(policy, Policy):
        mend = f"Make one: {policy.__name__}()." if isinstance(policy, type) else ""
        raise ArgumentTypeError(
            "gradient", policy, "Backprop(), Checkpointed(...), Discrete(), Backsolve() or Reversible()", mend
        )
    if isinstance(policy, Reversible) and solver != "reversible_heun":
        mend = "Use method='reversible_heun', or Discrete(), which is exact for the others."
        raise ArgumentError("gradient", policy, "a policy for a method that cannot be undone", mend)
    if isinstance(policy, Discrete | Backsolve) and solver == "reversible_heun":
        raise ArgumentError(
            "gradient", policy, "Reversible(), Backprop() or Checkpointed() for reversible_heun"
        )
    if isinstance(policy, Checkpointed) and chooses:
        mend = "Use Discrete(), which keeps one state per step that was taken."
        raise ArgumentError("gradient", policy, "a policy for steps that are not known beforehand", mend)
    if times.requires_grad and (chooses or not isinstance(policy, Backprop | Checkpointed)):
        mend = "Pass times.detach(), or use Backprop() or Checkpointed() with fixed steps."
        raise ArgumentError("times", times, f"times without gradient, which {name} does not give", mend)
    if isinstance(policy, Backsolve) and solver == EULER:
        warnings.warn(
            "Backsolve with method='euler' takes the Jacobian at the wrong end of each step: its error is of "
            "the size of a step, and at 20 steps can be that of the gradient. Discrete() costs the same and "
            "is exact",
            UserWarning,
            stacklevel=3,
        )


def _check_steps(steps_between: int | None, chooses: bool) -> int:
    if steps_between is None:
        return 1
    require_integer("steps_between", steps_between, 1)
    if chooses:
        raise ArgumentError("steps_between", steps_between, "None for a method that chooses its steps")
    return steps_between


def _check_tolerances(rtol: float | None, atol: float | None, chooses: bool) -> Tolerances:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            require_positive(name, value)
            if not chooses:
                raise ArgumentError(name, value, "None for a method with fixed steps", "Use method='dopri5'.")
    return Tolerances(1e-5 if rtol is None else rtol, 1e-6 if atol is None else atol)


def _refuse_without_values(chooses: bool, method: object) -> None:
    if chooses:
        raise UnsupportedError(
            f"integrate: {method!r} chooses its steps by values, which fake tensors do not have. Price a "
            "method with fixed steps"
        )


def _require_finite_states(found: State, times: Tensor) -> None:
    for part in found:
        if (
            isinstance(part, FakeTensor)
            or part.is_meta
            or torch._C._functorch.is_functorch_wrapped_tensor(part)
        ):
            continue
        finite = torch.isfinite(part.detach()).reshape(len(times), -1).all(1)
        if not bool(finite.all()):
            index = int(finite.long().argmin())
            raise NonFiniteError(
                f"integrate: the state at times[{index}] = {float(times[index])} is nan or infinite"
            )
