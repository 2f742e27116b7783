"""Evolution strategies: weigh random directions by how well they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thalweg.blackbox.directions import Bound, bind
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.blackbox.slopes import Slopes
from thalweg.blackbox.walk import walk
from thalweg.errors import ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.noise import Key
from thalweg.step import Closure, Estimate


@dataclass(frozen=True, slots=True)
class EvolutionStrategies:
    """Search directions from a population of Gaussian perturbations, weighed by their losses or their ranks.

    Choose it with ranks when losses have heavy tails or an arbitrary scale (rewards, counts, 0-1 losses).
    With raw weights and antithetic pairs it is exactly the average of central Gaussian `SPSA`.

    Args:
        samples: directions per estimate, at least 1; at least 2 for ranks without antithetic pairs.
        scale: standard deviation of the perturbation of each weight, above 0.
        antithetic: evaluate each direction forwards and backwards: 2 * samples evaluations. Without, raw
            weights have a variance of the order of (loss / scale)^2.
        weights: "raw" estimates the gradient of the loss smoothed by the perturbation, without bias. "ranks"
            replaces the losses by their ranks, spread evenly from -0.5 (best) to 0.5 (worst), ties sharing
            their mean: the same for every strictly increasing transform of the loss, and therefore *biased*,
            in length and in direction: a search direction, not a gradient.
        restore: "copy" or "swap", as in `SPSA`.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Salimans, Ho, Chen, Sidor, Sutskever: Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning. arXiv 1703.03864, 2017.

    Example:
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> rule = EvolutionStrategies(samples=4, scale=0.1, weights="ranks")
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=rule)
        >>> bool(weight.grad > 0)
        True
    """

    samples: int = 8
    scale: float = 1e-2
    antithetic: bool = True
    weights: Literal["raw", "ranks"] = "raw"
    restore: Literal["copy", "swap"] = "copy"

    def __post_init__(self) -> None:
        require_choice("weights", self.weights, ("raw", "ranks"))
        if not isinstance(self.antithetic, bool):
            raise ArgumentTypeError("antithetic", self.antithetic, "True or False")
        alone = self.weights == "ranks" and not self.antithetic
        require_integer("samples", self.samples, 2 if alone else 1)
        require_positive("scale", self.scale)
        require_choice("restore", self.restore, ("copy", "swap"))

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One evaluation per direction and sign.

        Returns:
            The search direction; the loss is the mean of all evaluations.

        Raises:
            NonFiniteError: a loss is nan or infinite; the message names the sample and the sign. Parameters
                and buffers are as before.
        """
        with torch.no_grad():
            return self.measure(Evaluations(closure, parameters), parameters, key).estimate(parameters)

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key."""
        return bind("gaussian", parameters, key, self.samples)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """As `estimate`, but the direction stays a few numbers and a key."""
        bound = self.bind(parameters, key)
        signs = (1, -1) if self.antithetic else (1,)
        found = []
        swapped = self.restore == "swap"
        with torch.no_grad(), eager_if(swapped), walk(parameters, bound, self.restore) as go:
            for sample in range(self.samples):
                for sign in signs:
                    go(sample, sign * self.scale)
                    found.append(evaluations.loss(f"sample {sample}, sign {'+' if sign > 0 else '-'}"))
        losses = torch.stack(found)
        weights = losses if self.weights == "raw" else centred_ranks(losses)
        signed = weights.view(self.samples, len(signs)) * weights.new_tensor(signs)
        coefficients = signed.sum(1) / (len(losses) * self.scale)
        return Slopes(losses.mean(), tuple(coefficients), bound, evaluations.count)


def centred_ranks(losses: Tensor) -> Tensor:
    """Replace values by ranks spread evenly over [-0.5, 0.5]; ties share the mean of their ranks.

    Args:
        losses: tensor of shape (count,), count at least 2.

    Example:
        >>> centred_ranks(torch.tensor([10.0, -3.0, 2.0]))
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    below = (losses[:, None] > losses).sum(1)
    above = (losses[:, None] < losses).sum(1)
    return (below - above).to(losses.dtype) / (2 * (len(losses) - 1))
