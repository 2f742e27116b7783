"""An energy as relaxation sees it: values to contrast, forces to follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from thalweg.equilibria.complex_plane import complex_plane
from thalweg.equilibria.state import State, examples
from thalweg.errors import ArgumentError, ArgumentTypeError


class Landscape(Protocol):
    """What relaxing needs to know of an energy."""

    def energies(self, state: State) -> Tensor:
        """The energy of each example, shape (batch,), or of all together."""
        ...

    def forces(self, state: State, which: Sequence[int], graph: bool) -> Sequence[Tensor]:
        """Minus the derivative of the energy by some parts of the state; with a graph on demand."""
        ...


class GivenEnergy:
    """A function given by the caller, checked; its forces by autograd.

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
