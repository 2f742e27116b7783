"""The backward of a rest state by nudging it with a linear cost, the incoming cotangent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from thalweg.equilibria.complex_plane import complex_plane, require_holomorphic
from thalweg.equilibria.convergence import MEND, Found, Status, iterate, judge
from thalweg.equilibria.landscape import Landscape
from thalweg.equilibria.nudged import Nudged, Number, contrast
from thalweg.equilibria.relaxation import Activation, Relaxation, activated, relax_once
from thalweg.equilibria.state import State, autocast_of, norms, per_example
from thalweg.errors import require_finite
from thalweg.noise import Key, fresh_key
from thalweg.rollouts.recorder import Recorder
from thalweg.rollouts.sweep import Gradients, Sweep, attach
from thalweg.step import refuse_wrappers


def nudged_state(
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
