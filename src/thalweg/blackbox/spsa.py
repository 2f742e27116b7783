"""SPSA: a gradient from the difference of two losses along a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thalweg.blackbox.directions import DIRECTIONS, Directions, combine
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.errors import require_choice, require_integer, require_positive
from thalweg.noise import Key
from thalweg.parameters import loan
from thalweg.step import Closure, Estimate


@dataclass(frozen=True, slots=True)
class SPSA:
    """Simultaneous perturbation: unbiased for smooth losses up to scale squared, and needs no derivative.

    Choose it when the loss has no derivative or when only a forward pass fits into memory. For d parameters
    and q samples the estimate has about (d + q) / q times the squared norm of the gradient: divide the
    learning rate of backpropagation by that factor, not by less.

    The directions are never stored but drawn again from the step's key. All evaluations of one estimate see
    the same torch random numbers and the same BatchNorm statistics, and afterwards both are as after one
    evaluation. (Compile the model, not the closure around it: in a compiled function the statistics of
    BatchNorm cannot be seen and move once per evaluation.) The closure runs under `torch.no_grad()`; one that
    differentiates with respect to its inputs has to call `torch.enable_grad()` itself.

    Args:
        samples: directions per estimate, at least 1.
        scale: length of the step along a direction, per coordinate, above 0; about a hundredth to a
            thousandth of a typical weight. In bfloat16 a step below 1/256 of a weight is rounded away.
        directions: "rademacher" (second moment d) or "gaussian" (second moment d + 2).
        side: "central" takes two evaluations a sample, and is exact on quadratics; "forward" takes one a
            sample and one for all, with an error of first order in the scale.
        restore: how the weights come back, bit for bit either way. "copy" changes all at once and keeps a
            copy of them; "swap" changes the weights of one module while it runs, so that memory grows by the
            largest module only; parameters must then be used inside the module that owns them, and compiled
            modules run uncompiled.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Paper:
        Spall: Multivariate stochastic approximation using a simultaneous perturbation gradient approximation.
        IEEE Transactions on Automatic Control 37, 1992. In place for large networks (MeZO): Malladi et al.:
        Fine-Tuning Language Models with Just Forward Passes. arXiv 2305.17333, 2023.

    Example:
        >>> from thalweg.step import backward
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> loss = backward(lambda: (weight**2).sum(), [weight], gradient=SPSA(scale=0.5))
        >>> weight.grad
        tensor([6.])
    """

    samples: int = 1
    scale: float = 1e-3
    directions: Directions = "rademacher"
    side: Literal["central", "forward"] = "central"
    restore: Literal["copy", "swap"] = "copy"

    def __post_init__(self) -> None:
        require_integer("samples", self.samples, 1)
        require_positive("scale", self.scale)
        require_choice("directions", self.directions, DIRECTIONS)
        require_choice("side", self.side, ("central", "forward"))
        require_choice("restore", self.restore, ("copy", "swap"))

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """Two evaluations per sample ("central"), or one per sample and one more ("forward").

        Returns:
            The gradient estimate; the loss is the mean of all evaluations ("central"), or the loss at the
            unchanged parameters ("forward").

        Raises:
            NonFiniteError: a loss is nan or infinite; the message names the sample and the sign. Parameters
                and buffers are as before.
        """
        evaluations = Evaluations(closure, parameters)
        losses: list[Tensor] = []
        coefficients: list[Tensor] = []
        with torch.no_grad(), eager_if(self.restore == "swap"):
            with loan(parameters, self.restore) as move:
                if self.side == "forward":
                    losses.append(evaluations.loss("the unchanged parameters"))
                for sample in range(self.samples):
                    plus = evaluations.loss_along(move, self.directions, key, sample, self.scale)
                    if self.side == "central":
                        minus = evaluations.loss_along(move, self.directions, key, sample, -self.scale)
                        losses += [plus, minus]
                        slope = (plus - minus) / (2 * self.scale)
                    else:
                        slope = (plus - losses[0]) / self.scale
                    coefficients.append(slope / self.samples)
            gradients = combine(self.directions, coefficients, parameters, key)
        return Estimate(torch.stack(losses).mean(), gradients, evaluations.count)
