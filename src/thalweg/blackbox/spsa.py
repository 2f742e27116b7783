"""SPSA: a gradient from the difference of two losses along a random direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thalweg.blackbox.directions import Bound, Directions, bind, reads_values, require_directions
from thalweg.blackbox.estimate import Evaluations, eager_if
from thalweg.blackbox.slopes import Slopes
from thalweg.blackbox.walk import RESTORES, Restore, walk
from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer, require_positive
from thalweg.noise import Key
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
        samples: directions per estimate, at least 1; with `Coordinates` sets of them.
        scale: length of the step along a direction, per coordinate, above 0; about a hundredth to a
            thousandth of a typical weight. In bfloat16 a step below 1/256 of a weight is rounded away.
        directions: "rademacher" (second moment d), "gaussian" (d + 2), "sphere" (radius sqrt(d): d),
            "coordinate" (one weight at a time, CGE), or a pattern: `LowRank`, `Sparse`, `Blocks`,
            `Coordinates`.
        side: "central" takes two evaluations a sample, and is exact on quadratics; "forward" takes one a
            sample and one for all, with an error of first order in the scale; "one" takes one a sample, and
            its variance is of the order of (loss / scale)^2: `OnePoint` subtracts a running baseline.
        restore: how the weights come back. "copy" changes all at once and keeps a copy of them; "swap"
            changes the weights of one module while it runs, so that memory grows by the largest module only;
            parameters must then be used inside the module that owns them, and compiled modules run
            uncompiled. Either is exact, bit for bit. "inplace" adds and subtracts again, anywhere and without
            a copy, and rounds at each return: in 100 steps weights of size 0.02 drift by 6e-7 of their norm
            in float32, by 0.5 % in float16 and by 4 % in bfloat16.
        weights: "raw" weighs each direction by the slope along it, "sign" by the slope's sign alone: robust
            against heavy tails, and *biased*, a search direction.
        allow_drift: take "inplace" in float16 and bfloat16 too, where it is refused otherwise.

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
    side: Literal["central", "forward", "one"] = "central"
    restore: Restore = "copy"
    weights: Literal["raw", "sign"] = "raw"
    allow_drift: bool = False

    def __post_init__(self) -> None:
        require_integer("samples", self.samples, 1)
        require_positive("scale", self.scale)
        require_directions("directions", self.directions)
        require_choice("side", self.side, ("central", "forward", "one"))
        require_choice("restore", self.restore, RESTORES)
        require_choice("weights", self.weights, ("raw", "sign"))
        if not isinstance(self.allow_drift, bool):
            raise ArgumentTypeError("allow_drift", self.allow_drift, "True or False")
        if self.restore == "inplace" and reads_values(self.directions):
            mend = "A mask by magnitude has to see the weights as they were: use 'swap' or 'copy'."
            raise ArgumentError("restore", self.restore, "'copy' or 'swap' with these directions", mend)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """Two evaluations per sample ("central"), one and one more ("forward"), or one ("one").

        Returns:
            The gradient estimate; the loss is the mean of all evaluations, or the loss at the unchanged
            parameters ("forward").

        Raises:
            NonFiniteError: a loss is nan or infinite; the message names the sample and the sign. Parameters
                and buffers are as before.
            ArgumentError: directions that do not fit the parameters, or "inplace" in half precision.
        """
        with torch.no_grad():
            return self.measure(Evaluations(closure, parameters), parameters, key).estimate(parameters)

    def bind(self, parameters: Sequence[Tensor], key: Key) -> Bound:
        """The directions of the estimate with this key."""
        return bind(self.directions, parameters, key, self.samples)

    def measure(self, evaluations: Evaluations, parameters: Sequence[Tensor], key: Key) -> Slopes:
        """As `estimate`, but the gradient stays a few numbers and a key."""
        self.refuse_drift(parameters)
        bound = self.bind(parameters, key)
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        with (
            torch.no_grad(),
            eager_if(self.restore == "swap"),
            walk(parameters, bound, self.restore) as go,
        ):
            if self.side == "forward":
                losses.append(evaluations.loss("the unchanged parameters"))
            for sample in range(len(bound.weights)):
                go(sample, self.scale)
                plus = evaluations.loss(f"sample {sample}, sign +")
                if self.side == "central":
                    go(sample, -self.scale)
                    minus = evaluations.loss(f"sample {sample}, sign -")
                    losses += [plus, minus]
                    slopes.append((plus - minus) / (2 * self.scale))
                elif self.side == "forward":
                    slopes.append((plus - losses[0]) / self.scale)
                else:
                    losses.append(plus)
                    slopes.append(plus / self.scale)
        if self.weights == "sign":
            slopes = [slope.sign() for slope in slopes]
        coefficients = tuple(slope * weight for slope, weight in zip(slopes, bound.weights))
        return Slopes(torch.stack(losses).mean(), coefficients, bound, evaluations.count)

    def refuse_drift(self, parameters: Sequence[Tensor]) -> None:
        """Raise where adding and subtracting again would move the weights noticeably."""
        if self.restore != "inplace" or self.allow_drift:
            return
        for index, parameter in enumerate(parameters):
            if parameter.element_size() < 4:
                mend = "'swap' and 'copy' are exact; allow_drift=True accepts weights that wander."
                raise ArgumentError(
                    f"parameters[{index}]", parameter, "float32 or float64 for restore='inplace'", mend
                )
