"""PGPE: evolution strategies that also learn how far to search, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.blackbox.directions import Bound, bind, weighted_sum
from thalweg.blackbox.estimate import Evaluations
from thalweg.blackbox.evolution_strategies import centred_ranks
from thalweg.blackbox.walk import walk
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


class PGPE:
    """Antithetic pairs around the parameters, with a standard deviation per weight that adapts to the losses.

    Choose it over `EvolutionStrategies` when the weights differ in how far they may be moved, or when nobody
    knows how far. Costs one more number per weight, and one draw of each direction more.

    The search direction is that of the mean under the distribution's own metric, (1/n) sum (w+ - w-)/2 e with
    perturbations e: the gradient times the variance. It has state: every estimate moves `scales`.

    Args:
        samples: pairs per estimate, at least 1; 2 * samples evaluations.
        scale: standard deviation of every weight at the start, above 0.
        rate: learning rate of the standard deviations, at least 0; 0 keeps them.
        weights: "ranks" as in `EvolutionStrategies`, or "raw" for the losses themselves.
        max_change: by which part of itself a standard deviation may change per estimate, above 0, below 1.

    Raises:
        ArgumentError, ArgumentTypeError: an argument out of range.

    Paper:
        Sehnke, Osendorfer, Rückstieß, Graves, Peters, Schmidhuber: Parameter-exploring policy gradients.
        Neural Networks 23, 2010.

    Example:
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> rule = PGPE(samples=8, scale=0.5)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=rule)
        >>> bool(weight.grad > 0), rule.scales[0].shape
        (True, torch.Size([1]))
    """

    def __init__(
        self,
        samples: int = 8,
        scale: float = 0.1,
        rate: float = 0.1,
        weights: Literal["ranks", "raw"] = "ranks",
        max_change: float = 0.2,
    ) -> None:
        require_integer("samples", samples, 1)
        require_positive("scale", scale)
        if rate != 0:
            require_positive("rate", rate)
        require_choice("weights", weights, ("ranks", "raw"))
        require_positive("max_change", max_change)
        if max_change >= 1:
            raise ArgumentError("max_change", max_change, "a number above 0 and below 1")
        self.samples, self.scale, self.rate = samples, scale, rate
        self.weights, self.max_change = weights, max_change
        self.scales: tuple[Tensor, ...] = ()

    def __repr__(self) -> str:
        return (
            f"PGPE(samples={self.samples}, scale={self.scale}, rate={self.rate}, weights={self.weights!r}, "
            f"max_change={self.max_change})"
        )

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The standard deviations, one tensor per parameter; none before the first estimate."""
        return {"scales": list(self.scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ArgumentTypeError: something else.
        """
        if not isinstance(state, Mapping) or set(state) != {"scales"}:
            raise ArgumentTypeError("state", state, "what state_dict() returned")
        self.scales = tuple(scale.clone() for scale in state["scales"])

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """Two evaluations per sample.

        Returns:
            The search direction; the loss is the mean of all evaluations.

        Raises:
            NonFiniteError: a loss is nan or infinite; parameters, buffers and standard deviations are as
                before.
            ArgumentError: other parameters than in the estimates before.
        """
        evaluations = Evaluations(closure, parameters)
        scales = self._scales_of(parameters)
        bound = _Scaled(bind("gaussian", parameters, key, self.samples), scales)
        found = []
        with torch.no_grad():
            with walk(parameters, bound, "copy") as go:
                for sample in range(self.samples):
                    for sign in (1, -1):
                        go(sample, sign)
                        found.append(evaluations.loss(f"sample {sample}, sign {'+' if sign > 0 else '-'}"))
            losses = torch.stack(found)
            # without a bias: what all losses share says nothing about a direction or a length
            weights = centred_ranks(losses) if self.weights == "ranks" else losses - losses.mean()
            plus, minus = weights.view(self.samples, 2).unbind(1)
            differences = tuple((plus - minus) / (2 * self.samples))
            sums = tuple((plus + minus) / (2 * self.samples))
            gradients = tuple(
                weighted_sum(bound, differences, index, p) for index, p in enumerate(parameters)
            )
            moved = tuple(self._moved(bound, sums, index, p) for index, p in enumerate(parameters))
        if not isinstance(losses, FakeTensor):
            self.scales = moved
        return Estimate(losses.mean(), gradients, evaluations.count)

    def _scales_of(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [parameter.shape for parameter in parameters]
        if self.scales and [scale.shape for scale in self.scales] != shapes:
            mend = "A PGPE keeps one standard deviation per weight: make one for each set of parameters."
            raise ArgumentError("parameters", shapes, "the parameters of the estimates before", mend)
        if self.scales:
            return tuple(scale.to(p.device) for scale, p in zip(self.scales, parameters))
        return tuple(
            torch.full_like(p, self.scale, dtype=torch.promote_types(p.dtype, torch.float32))
            for p in (parameter.detach() for parameter in parameters)
        )

    def _moved(self, bound: _Scaled, sums: Sequence[Tensor], index: int, parameter: Tensor) -> Tensor:
        """The standard deviations after a step down: weight times scale^2 d log p / d scale, averaged."""
        old, slope = bound.scales[index], None
        if not self.rate:
            return old
        for sample, weight in enumerate(sums):
            away = bound.part(sample, index, parameter.detach()).to(old.dtype)
            term = (away.square_() - old.square()).div_(old).mul_(weight.to(old.device, old.dtype))
            slope = term if slope is None else slope.add_(term)
        assert slope is not None
        new = old - self.rate * slope
        return torch.clamp(new, old * (1 - self.max_change), old * (1 + self.max_change))


@dataclass(frozen=True, slots=True, eq=False)
class _Scaled:
    """Directions times the standard deviation of each weight."""

    inner: Bound
    scales: tuple[Tensor, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        return self.inner.weights

    def part(self, sample: int, index: int, value: Tensor) -> Tensor:
        drawn = self.inner.part(sample, index, value)
        assert drawn is not None
        return drawn.mul_(self.scales[index])
