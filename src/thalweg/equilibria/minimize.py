"""The state of least energy, and how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thalweg.equilibria.complex_plane import complex_plane, require_holomorphic
from thalweg.equilibria.convergence import (
    Found,
    Status,
    iterate,
    judge,
    refuse_policy,
    require_limits,
    require_no_transform,
    require_status,
)
from thalweg.equilibria.fixed_point import MEND, settle
from thalweg.equilibria.implicit import Implicit, OneStep
from thalweg.equilibria.nudged import Nudged, Number, contrast
from thalweg.equilibria.relaxation import (
    Activation,
    Descent,
    Relaxation,
    activated,
    relax_once,
    require_relaxation,
)
from thalweg.equilibria.state import State, autocast_of, examples, norms, per_example, taken_apart
from thalweg.errors import ArgumentError, ArgumentTypeError, require_finite
from thalweg.noise import Key, fresh_key
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.sweep import Gradients, Sweep, attach
from thalweg.step import Backprop, refuse_wrappers

_ACCEPTED = "Backprop(), Implicit(...), OneStep() or Nudged(strength)"


def minimize(
    energy: Callable[[Any], Tensor],
    start: Any,
    *,
    gradient: Backprop | Implicit | OneStep | Nudged | None = None,
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
    policy = Implicit() if gradient is None else gradient
    if not isinstance(policy, Backprop | Implicit | OneStep | Nudged):
        refuse_policy("minimize", policy, _ACCEPTED)
    require_limits(tolerance, max_steps)
    require_status(status)
    if key is not None and not isinstance(key, Key):
        raise ArgumentTypeError("key", key, "a thalweg.noise.Key or None")
    parts, together = taken_apart("start", start)
    mend = "Write the relaxation step out, and use fixed_point with Backprop() and tolerance=None."
    require_no_transform(f"minimize with {type(policy).__name__}", mend)
    dynamics = Descent() if relaxation is None else relaxation
    require_relaxation(dynamics, len(parts))
    landscape = Landscape(energy, together)

    def step(state: State) -> State:
        graph = torch.is_grad_enabled()
        return relax_once(dynamics, lambda s, which: landscape.forces(s, which, graph), state)

    if not isinstance(policy, Nudged):
        found = settle(step, parts, policy, tolerance, max_steps, "iterate", strict, status, "minimize")
        return together(found)
    with torch.no_grad():
        first = tuple(part.detach() for part in parts)
        free = iterate(step, first, tolerance, max_steps, "minimize", status is not None)
    if status is not None:
        status.iterations, status.residual = free.iterations, free.residual
    judge(free, tolerance, "minimize", strict, MEND)
    for part in free.state:
        require_finite("minimize: the rest state", part)
    limits = (tolerance, max_steps) if policy.steps is None else (None, policy.steps)
    return together(_nudged(landscape, dynamics, policy, free.state, limits, strict, status, key))


class Landscape:
    """An energy, its checks and its forces.

    Args:
        energy: the caller's function of a state.
        together: makes the caller's state of a tuple of tensors.
    """

    def __init__(self, energy: Callable[[Any], Tensor], together: Callable[[Sequence[Tensor]], Any]) -> None:
        self._energy = energy
        self._together = together

    def energies(self, state: State) -> Tensor:
        """The energy of each example, or of all together, checked."""
        found = self._energy(self._together(state))
        count = examples(state)
        wanted = f"one value per example, shape ({count},), or a scalar"
        if not isinstance(found, Tensor) or not (found.is_floating_point() or found.is_complex()):
            raise ArgumentTypeError("energy", found, f"a function that returns {wanted}")
        if found.shape not in ((), (count,)):
            mend = "Sum over everything but the first dimension."
            raise ArgumentError("energy", found, f"a function that returns {wanted}", mend)
        return found

    def forces(self, state: State, which: Sequence[int], graph: bool) -> tuple[Tensor, ...]:
        """Minus the derivative of the energy by some parts of the state; with a graph on demand."""
        leaves = list(state)
        for index in range(len(state)):
            if not (graph and state[index].requires_grad):
                leaves[index] = state[index].detach().requires_grad_(graph or index in which)
        with torch.enable_grad(), complex_plane(leaves[0].is_complex()):
            energies = self.energies(tuple(leaves))
            if not energies.requires_grad:
                raise ArgumentError(
                    "energy", energies, "a function that depends on the state", "Is it detached?"
                )
            wanted = [leaves[index] for index in which]
            ones = torch.ones_like(energies)
            found = torch.autograd.grad(energies, wanted, ones, create_graph=graph, allow_unused=True)
        for index, force in zip(which, found):
            if force is None:
                raise ArgumentError(
                    "energy", energies, f"a function of all parts of the state; part {index} is unused"
                )
        # autograd conjugates the derivative of a holomorphic function
        return tuple(-(force.conj() if force.is_complex() else force) for force in found if force is not None)


def _nudged(
    landscape: Landscape,
    dynamics: Relaxation,
    policy: Nudged,
    rest: State,
    limits: tuple[float | None, int],
    strict: bool,
    status: Status | None,
    key: Key | None,
) -> State:
    """Join a rest state to what its energy closes over by the contrast of nudged states."""
    name = "Nudged"
    recorder = Recorder(lambda state, _: (landscape.energies(state),), rest, name, replay=False)
    nothing = rest[0].new_zeros(())
    with torch.no_grad(), refuse_wrappers(name):
        (energies,) = recorder.value(rest, nothing, None)
        require_finite("minimize: the energy at the rest state", energies)
        signs = fresh_key(rest[0]) if policy.form == "random" and key is None else key
    if not torch.is_grad_enabled() or not recorder.captured:
        return rest
    # without these copies the node would hold its own output
    outputs, like, together = tuple(p.detach() for p in rest), rest[0].new_empty(0), energies.ndim == 0
    again = autocast_of(rest)

    def run(inputs: State, kept: State, cotangents: State) -> Gradients:
        recorder.gradients = [None] * len(recorder.captured)
        lengths = _lengths(cotangents, policy, together)
        safe = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        pull = tuple(c / per_example(safe, c) for c in cotangents)
        for c in pull:
            require_finite("Nudged: the cotangent of the rest state", c)
        count, residual = 0, None
        for at, weight in contrast(policy, like, signs):
            with again():
                found = _relaxed(landscape, dynamics, policy, kept, pull, at, limits, status is not None)
            judge(found, limits[0], f"Nudged: the relaxation at strength {at}", strict, MEND)
            count += found.iterations
            if found.residual is not None:
                residual = found.residual if residual is None else torch.maximum(residual, found.residual)
            with complex_plane(isinstance(at, complex)):
                leaves, (energy,) = recorder.graph(found.state, nothing)
            scale = torch.ones_like(energy) * lengths * weight
            recorder.pull(leaves, (energy,), (scale.conj() if scale.is_complex() else scale,))
        if status is not None:
            status.adjoint_iterations, status.adjoint_residual = count, residual
        return tuple(recorder.gradients)

    return attach(Sweep(name, outputs, rest, run), tuple(recorder.captured))


def _lengths(cotangents: State, policy: Nudged, together: bool) -> Tensor:
    """What each example's cotangent is divided by; one number where the energy is one for all."""
    each = norms(cotangents)
    if not policy.normalize:
        return torch.ones_like(each.sum() if together else each)
    return torch.linalg.vector_norm(each) if together else each


def _relaxed(
    landscape: Landscape,
    dynamics: Relaxation,
    policy: Nudged,
    rest: State,
    pull: State,
    at: Number,
    limits: tuple[float | None, int],
    measured: bool,
) -> Found:
    """The state relaxed from rest under the energy plus `at` times the linear cost."""
    still = isinstance(at, float) and at == 0
    if still and not policy.cancel_drift:
        return Found(rest, 0, None, True)
    in_plane = isinstance(at, complex)
    start = tuple(part.to(part.dtype.to_complex()) for part in rest) if in_plane else rest

    def forces(state: State, which: Sequence[int]) -> list[Tensor]:
        found = landscape.forces(state, which, False)
        return [force - at * pull[index] for force, index in zip(found, which)]

    what = f"Nudged: the relaxation at strength {at}"
    with torch.no_grad(), complex_plane(in_plane):
        found = iterate(lambda s: relax_once(dynamics, forces, s), start, *limits, what, measured)
        if in_plane:
            _require_holomorphic(landscape, dynamics, found.state)
    return found


def _require_holomorphic(landscape: Landscape, dynamics: Relaxation, state: State) -> None:
    """Check energy and activations at a complex state."""
    for index, part in enumerate(state):

        def energy(value: Tensor, index: int = index) -> Tensor:
            return landscape.energies((*state[:index], value, *state[index + 1 :]))

        require_holomorphic("the energy", energy, part)
        if isinstance(dynamics, Activation):
            require_holomorphic("the activation", partial(activated, dynamics, index), part)
