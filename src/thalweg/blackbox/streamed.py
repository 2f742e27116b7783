"""Hand over one parameter's gradient at a time, so that its hook can step and free it before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from thalweg.blackbox.estimate import Evaluations
from thalweg.blackbox.slopes import Measuring, Slopes
from thalweg.blackbox.spsa import SPSA
from thalweg.errors import ArgumentTypeError, NonFiniteError
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


@dataclass(frozen=True, slots=True)
class Streamed:
    """Make each parameter's gradient only when it is handed over: hooks that step let none be stored.

    Choose it with an optimizer fused into the backward pass, one `torch.optim` optimizer per parameter that
    steps in `register_post_accumulate_grad_hook`: then memory is that of inference, the largest parameter and
    the optimizers' own state. Without such hooks it fills the same `.grad` as the rule alone. Steps that
    need no state are `MeZO`'s.

    Args:
        gradient: a rule whose gradient is a sum over keyed directions: `SPSA`, `EvolutionStrategies`,
            `ForwardGradient`, `OnePoint`. Take `restore="swap"`, which keeps no copy of the weights.

    Raises:
        ArgumentTypeError: another rule.

    Example:
        >>> from thalweg.step import backward
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizers = {p: torch.optim.Adam([p], lr=0.01) for p in model.parameters()}
        >>> def step_and_free(parameter):
        ...     optimizers[parameter].step()
        ...     parameter.grad = None
        >>> for parameter in optimizers:
        ...     handle = parameter.register_post_accumulate_grad_hook(step_and_free)
        >>> rule = Streamed(SPSA(restore="swap"))
        >>> loss = backward(lambda: model(torch.ones(1, 2)).square().mean(), optimizers, gradient=rule)
        >>> model.weight.grad is None
        True
    """

    gradient: Measuring = field(default_factory=lambda: SPSA(restore="swap"))

    def __post_init__(self) -> None:
        if isinstance(self.gradient, type) or not isinstance(self.gradient, Measuring):
            expected = "a rule over keyed directions: SPSA, EvolutionStrategies, ForwardGradient, OnePoint"
            raise ArgumentTypeError("gradient", self.gradient, expected)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """The rule's evaluations; each gradient is made when it is looked at, and again when looked at again.

        Raises:
            NonFiniteError: a coefficient is too large for the dtype of the parameters.
        """
        with torch.no_grad():
            found = self.gradient.measure(Evaluations(closure, parameters), parameters, key)
        return StreamedEstimate(found, tuple(parameters))


class StreamedEstimate(Estimate):
    """An estimate whose gradients are made one at a time."""

    __slots__ = ()

    def __init__(self, found: Slopes, parameters: tuple[Tensor, ...]) -> None:
        gradients: Any = _Lazily(found, parameters)
        super().__init__(found.loss, gradients, found.evaluations)

    def fill(self, parameters: Sequence[Tensor]) -> None:
        """Hand each parameter its gradient through autograd before the next one is made."""
        made: Any = self.gradients
        _require_representable(made.found, parameters)
        for index, parameter in enumerate(parameters):
            with torch.no_grad():
                gradient = made.found.part(index, parameter)
            if gradient is not None:
                with torch.enable_grad():
                    view = parameter.view_as(parameter)
                torch.autograd.backward([view], [gradient])
            # or it would live on while the next one is made
            del gradient


class _Lazily(Sequence[Tensor | None]):
    def __init__(self, found: Slopes, parameters: tuple[Tensor, ...]) -> None:
        self.found, self._parameters = found, parameters

    def __len__(self) -> int:
        return len(self._parameters)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        with torch.no_grad():
            return self.found.part(place, self._parameters[place])

    def __iter__(self) -> Iterator[Tensor | None]:
        return (self[index] for index in range(len(self)))


def _require_representable(found: Slopes, parameters: Sequence[Tensor]) -> None:
    """Before anything is handed over: no gradient may overflow when the parameters before it have moved."""
    largest = torch.stack([coefficient.detach().abs().double() for coefficient in found.coefficients]).sum()
    for index, parameter in enumerate(parameters):
        # no draw of a normal distribution from 32 random bits leaves 16 standard deviations
        limit = torch.finfo(parameter.dtype).max / 16
        if not bool(largest <= limit):
            raise NonFiniteError(f"gradients[{index}] may overflow {parameter.dtype}: coefficient {largest}")
