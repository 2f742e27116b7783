"""The state of least energy, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
from thalweg.equilibria.fixed_point import settle
from thalweg.equilibria.implicit import Implicit, OneStep
from thalweg.equilibria.landscape import GivenEnergy, Landscape
from thalweg.equilibria.nudged import Nudged
from thalweg.equilibria.nudged_vjp import nudged_state
from thalweg.equilibria.relaxation import Descent, Relaxation, relax_once, require_relaxation
from thalweg.equilibria.state import State, taken_apart
from thalweg.errors import ArgumentTypeError, require_finite
from thalweg.noise import Key
from thalweg.step import Backprop

Policy = Backprop | Implicit | OneStep | Nudged
_ACCEPTED = "Backprop(), Implicit(...), OneStep() or Nudged(strength)"


def minimize(
    energy: Callable[[Any], Tensor],
    start: Any,
    *,
    gradient: Policy | None = None,
    relaxation: Relaxation | None = None,
    tolerance: float | None = 1e-5,
    max_steps: int = 500,
    strict: bool = True,
    status: Status | None = None,
    key: Key | None = None,
) -> Any:
    """Relax a state to a minimum of its energy, and choose how the minimum is differentiated.

    Gradients reach the parameters, the inputs and whatever else the energy closes over.

    | gradient | choose it | kept for backward | the gradient is | twice |
    | --- | --- | --- | --- | --- |
    | `Implicit(...)` | first | one step | exact at the rest state | refused |
    | `Nudged(strength)` | nothing but relaxing is possible | the state | biased, see its table | refused |
    | `Backprop()` | to compare, or a second derivative | every step | exact for the steps taken | yes |
    | `OneStep()` | the relaxation contracts strongly | one step | biased | refused |

    All support autocast and refuse `torch.func` transforms by name.

    Args:
        energy: energy(s) for a state nested like `start`; returns one value per example, shape (batch,), or a
            scalar. Differentiable, the same whenever it is called. For `Activation` it is minus the primitive
            function.
        start: s0: a tensor, or tensors in tuples, lists and dicts. Where each part has a first dimension and
            another beside it, that dimension counts examples.
        gradient: None for `Implicit()`.
        relaxation: the dynamics; None for `Descent(rate=0.5)`.
        tolerance: the state rests when a step moves no example by more than this, relative to one plus its
            norm; above 0. None takes exactly `max_steps`, without looking. What is left of the way divided
            by the strength is the error that `Nudged` makes of it.
        max_steps: at least 1; of the free relaxation, and of each nudged one where `Nudged` does not say.
        strict: raise when `max_steps` did not suffice; False warns.
        status: gets the number of steps and the residuals of forward and backward.
        key: of the random sign of `Nudged(form="random")`; None draws one, governed by `torch.manual_seed`.

    Returns:
        The relaxed state, nested like `start`.

    Raises:
        ConvergenceError: a relaxation or the adjoint equation did not converge.
        NonFiniteError: energy or state became nan or infinite.
        UnsupportedError: what a policy cannot serve, by name.
        ArgumentError, ArgumentTypeError: a wrong argument, or a policy that is none of the four.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> x = torch.randn(8, 3)
        >>> energy = lambda s: (0.5 * s.square() - s * layer(x)).sum(1)
        >>> s = minimize(energy, torch.zeros(8, 4), gradient=Nudged(0.1))
        >>> s.square().mean().backward()
        >>> layer.weight.grad.shape
        torch.Size([4, 3])
    """
    if not callable(energy):
        raise ArgumentTypeError("energy", energy, "a function of the state")
    parts, together = taken_apart("start", start)
    found = minimized(
        GivenEnergy(energy, together),
        parts,
        Descent() if relaxation is None else relaxation,
        gradient=gradient,
        tolerance=tolerance,
        max_steps=max_steps,
        strict=strict,
        status=status,
        key=key,
    )
    return together(found)


def minimized(
    landscape: Landscape,
    start: State,
    dynamics: Relaxation,
    *,
    gradient: Policy | None,
    tolerance: float | None,
    max_steps: int,
    strict: bool,
    status: Status | None,
    key: Key | None,
) -> State:
    """What `minimize` does on a landscape that may know its forces better than autograd; same arguments."""
    policy = Implicit() if gradient is None else gradient
    if not isinstance(policy, Backprop | Implicit | OneStep | Nudged):
        refuse_policy("minimize", policy, _ACCEPTED)
    require_limits(tolerance, max_steps)
    require_status(status)
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    require_relaxation(dynamics, len(start))
    mend = "Write the relaxation step out, and use fixed_point with Backprop() and tolerance=None."
    require_no_transform(f"minimize with {type(policy).__name__}", mend)

    def step(state: State) -> State:
        graph = torch.is_grad_enabled()
        return relax_once(dynamics, lambda s, which: landscape.forces(s, which, graph), state)

    if not isinstance(policy, Nudged):
        return settle(step, start, policy, tolerance, max_steps, "iterate", strict, status, "minimize")
    with torch.no_grad():
        first = tuple(part.detach() for part in start)
        free = iterate(step, first, tolerance, max_steps, "minimize", status is not None)
    if status is not None:
        status.iterations, status.residual = free.iterations, free.residual
    judge(free, tolerance, "minimize", strict, MEND)
    for part in free.state:
        require_finite("minimize: the rest state", part)
    limits = (tolerance, max_steps) if policy.steps is None else (None, policy.steps)
    return nudged_state(landscape, dynamics, policy, free.state, limits, strict, status, key)
