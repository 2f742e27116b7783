"""How a state relaxes: what one step makes of the force on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from thalweg.equilibria.state import State
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_positive,
)

Order = Literal["together", "even-odd"]
Bound = float | None
Forces = Callable[[State, Sequence[int]], Sequence[Tensor]]
ORDERS = ("together", "even-odd")


@dataclass(frozen=True, slots=True)
class Descent:
    """Gradient descent on the energy, clipped to a box: s <- clip(s + rate * force, lower, upper).

    Choose it for an energy that is complete, such as one with a term |s|^2 / 2 for the units' leak. Without
    bounds and with a rate below 2 / L, L being the energy's largest curvature, the energy never rises. With
    `rate=1` and order "even-odd", a layered Hopfield energy takes each layer to its exact minimum given the
    others: the fast simulation.

    Args:
        rate: step size, above 0.
        lower: smallest value of a unit, or None; a tuple has one per part of the state.
        upper: largest value, likewise.
        order: "together" moves all parts at once; "even-odd" parts 0, 2, 4..., then 1, 3, 5... by their new
            neighbours, which counts as one step.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range, or a lower bound above the upper one.

    Example:
        >>> import torch
        >>> Descent(rate=0.5, lower=0.0).update(0, torch.tensor([1.0]), torch.tensor([-3.0]))
        tensor([0.])
    """

    rate: float = 0.5
    lower: Bound | tuple[Bound, ...] = None
    upper: Bound | tuple[Bound, ...] = None
    order: Order = "together"

    def __post_init__(self) -> None:
        require_positive("rate", self.rate)
        require_choice("order", self.order, ORDERS)
        for name in ("lower", "upper"):
            value = getattr(self, name)
            for bound in value if isinstance(value, tuple) else (value,):
                if isinstance(bound, bool) or not isinstance(bound, int | float | None):
                    raise ArgumentTypeError(name, bound, "a number, None, or a tuple of them")
        widths = {len(b) for b in (self.lower, self.upper) if isinstance(b, tuple)}
        if len(widths) > 1:
            raise ArgumentError("upper", self.upper, f"as many bounds as lower, {self.lower}")
        for index in range(widths.pop() if widths else 1):
            low, high = _of(self.lower, index), _of(self.upper, index)
            if low is not None and high is not None and not low <= high:
                raise ArgumentError("lower", low, f"a number up to the upper bound {high}")

    def update(self, index: int, state: Tensor, force: Tensor) -> Tensor:
        """One part of the state after a step; `force` is minus the derivative of the energy."""
        moved = state + self.rate * force
        low, high = _of(self.lower, index), _of(self.upper, index)
        if low is None and high is None:
            return moved
        if moved.is_complex():
            raise UnsupportedError(
                "Descent with bounds has no holomorphic extension, a clip is not analytic. Use "
                "Activation(smooth_clip), or another form of Nudged"
            )
        return moved.clamp(low, high)

    def fits(self, parts: int) -> None:
        """Raise unless tuples of bounds have one for each of so many parts."""
        for name in ("lower", "upper"):
            _require_width(name, getattr(self, name), parts)


@dataclass(frozen=True, slots=True)
class Activation:
    """The dynamics of a convergent recurrent network: s <- function(force).

    Choose it for an energy that leaves out the units' own term: minus the primitive function Phi, for example
    -sum s_l (W_l s_{l-1} + b_l). The rest state is then stationary for that energy plus a term of s alone
    whose derivative is the inverse of the function, so the theorem of equilibrium propagation holds.

    Args:
        function: elementwise and increasing, such as `torch.tanh` or `scaled_sigmoid`; a tuple has one per
            part of the state.
        order: as in `Descent`.

    Raises:
        ArgumentError, ArgumentTypeError: no function, or an unknown order.

    Paper:
        Laborieux and others: Scaling Equilibrium Propagation to Deep ConvNets. Frontiers in Neuroscience
        2021, arXiv 2006.03824.

    Example:
        >>> import torch
        >>> Activation(torch.tanh).update(0, torch.ones(1), torch.zeros(1))
        tensor([0.])
    """

    function: Callable[[Tensor], Tensor] | tuple[Callable[[Tensor], Tensor], ...]
    order: Order = "together"

    def __post_init__(self) -> None:
        functions = self.function if isinstance(self.function, tuple) else (self.function,)
        for function in functions:
            if not callable(function) or isinstance(function, type):
                raise ArgumentTypeError("function", function, "an elementwise function, or a tuple of them")
        require_choice("order", self.order, ORDERS)

    def update(self, index: int, state: Tensor, force: Tensor) -> Tensor:
        """One part of the state after a step; `force` is minus the derivative of the energy."""
        function = self.function[index] if isinstance(self.function, tuple) else self.function
        return function(force)

    def fits(self, parts: int) -> None:
        """Raise unless a tuple of functions has one for each of so many parts."""
        _require_width("function", self.function, parts)


Relaxation = Descent | Activation


def relax_once(
    relaxation: Relaxation, forces: Forces, state: State, free: Sequence[int] | None = None
) -> State:
    """One step of a relaxation.

    Args:
        relaxation: what a step makes of the forces.
        forces: `forces(state, indices)` returns the force on those parts.
        state: the state before.
        free: the parts that move; None for all.
    """
    indices = range(len(state)) if free is None else free
    groups: list[list[int]] = [list(indices)]
    if relaxation.order == "even-odd":
        groups = [[i for i in indices if i % 2 == parity] for parity in (0, 1)]
    parts = list(state)
    for group in groups:
        if group:
            for index, force in zip(group, forces(tuple(parts), group)):
                parts[index] = relaxation.update(index, parts[index], force)
    return tuple(parts)


def activated(dynamics: Activation, index: int, force: Tensor) -> Tensor:
    """The activation of one part alone."""
    return dynamics.update(index, force, force)


def require_relaxation(relaxation: object, parts: int) -> None:
    """Raise unless it is one of the two, and fits a state of so many parts."""
    if not isinstance(relaxation, Descent | Activation):
        raise ArgumentTypeError("relaxation", relaxation, "Descent(...) or Activation(function)")
    relaxation.fits(parts)


def _of(bound: Bound | tuple[Bound, ...], index: int) -> Bound:
    return bound[index] if isinstance(bound, tuple) else bound


def _require_width(name: str, value: object, parts: int) -> None:
    if isinstance(value, tuple) and len(value) != parts:
        raise ArgumentError(f"relaxation.{name}", value, f"one entry per part of the state, {parts}")
