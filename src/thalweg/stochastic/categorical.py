"""Categorical neuron: a one-hot vector, drawn, with a gradient of your choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thalweg import noise
from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating, require_positive
from thalweg.gates.straight_through import with_gradient_of
from thalweg.stochastic import tape
from thalweg.stochastic.neurons import StraightThrough


@dataclass(frozen=True, slots=True)
class StraightThroughGumbel:
    """Differentiate a category through the softmax of the logits with the Gumbel noise that decided it.

    Choose it where the gradient should know how close the decision was; biased, and a temperature to choose.

    Args:
        temperature: above 0; low is close to the decision and noisy, high is smooth and biased.

    Raises:
        ArgumentTypeError, ArgumentError: a temperature out of range.

    Paper:
        Jang, Gu, Poole: Categorical Reparameterization with Gumbel-Softmax. ICLR 2017, arXiv 1611.01144.

    Example:
        >>> StraightThroughGumbel(temperature=0.5)
        StraightThroughGumbel(temperature=0.5)
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_positive("temperature", self.temperature)


@dataclass(frozen=True, slots=True)
class ReinMax:
    """Differentiate a category by Heun's method instead of Euler's: right to second order, nothing to tune.

    Choose it first: it costs what straight-through costs and has no bias where the loss is quadratic in the
    one-hot vector; straight-through is right only where it is linear.

    Paper:
        Liu, Dong, Liu, Yu, Gao: Bridging Discrete and Backpropagation: Straight-Through and Beyond.
        NeurIPS 2023, arXiv 2304.08612.

    Example:
        >>> ReinMax()
        ReinMax()
    """


Gradient = StraightThrough | StraightThroughGumbel | ReinMax
_DEFAULT = ReinMax()


class CategoricalNeuron(nn.Module):
    """Turn logits over the last dimension into one-hot vectors: drawn in training, the largest in evaluation.

    Keys and transforms as in `BinaryNeuron`: the same categories under checkpointing, a second backward,
    `torch.compile` and whatever the gradient; `vmap`, second derivatives and forward mode (those of the
    smooth stand-in) and autocast work. A logit of minus infinity is a category that is never drawn. A row
    with a nan, or without any finite logit, comes out as nan.

    Args:
        gradient: `ReinMax()`; `StraightThrough(slope="softmax")`, whose Jacobian is the softmax's, or
            `StraightThrough()`, which passes the gradient to the logits unchanged; or
            `StraightThroughGumbel(temperature)`. All work under a plain `loss.backward()`.

    Shape:
        Input and output (..., categories), floating point, the same dtype.

    Raises:
        ArgumentTypeError: `gradient` is none of these, or logits are not floating point. None is refused,
            too: the estimators of `thalweg.backward` know binary units only.
        ArgumentError: a slope that has no meaning for categories, or logits without a last dimension.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0, -float("inf")]], requires_grad=True)
        >>> choice = CategoricalNeuron().eval()(logits)
        >>> choice
        tensor([[0., 1., 0.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, gradient: Gradient = _DEFAULT) -> None:
        super().__init__()
        if not isinstance(gradient, StraightThrough | StraightThroughGumbel | ReinMax):
            mend = "Score-function estimators need binary units, BinaryNeuron(gradient=None)."
            expected = "ReinMax(), StraightThrough(slope='softmax') or StraightThroughGumbel()"
            raise ArgumentTypeError("gradient", gradient, expected, mend if gradient is None else "")
        if isinstance(gradient, StraightThrough) and gradient.slope not in ("identity", "softmax"):
            raise ArgumentError("gradient", gradient, "slope='softmax' or slope='identity' for categories")
        self.gradient = gradient

    def forward(self, logits: Tensor) -> Tensor:
        """Choose; `logits` and the result have the same shape and dtype."""
        require_floating("logits", logits)
        if not logits.ndim or not logits.shape[-1]:
            raise ArgumentError("logits", logits, "a last dimension of at least one category")
        noisy = logits
        if self.training:
            numbers = tape.uniform_numbers(logits, noise.fresh_key(logits))
            tiny = torch.finfo(numbers.dtype).tiny
            noisy = logits.to(numbers.dtype) - torch.log(-torch.log(numbers.clamp(min=tiny)))
        hard = _one_hot(noisy.detach()).to(logits.dtype)
        return with_gradient_of(self._stand_in(logits, noisy, hard), hard)

    def _stand_in(self, logits: Tensor, noisy: Tensor, hard: Tensor) -> Tensor:
        if isinstance(self.gradient, StraightThroughGumbel):
            return torch.softmax(noisy / self.gradient.temperature, -1).to(logits.dtype)
        if isinstance(self.gradient, ReinMax):
            return _heun(logits, hard)
        return logits if self.gradient.slope == "identity" else torch.softmax(logits, -1)

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"gradient={self.gradient}"


def _one_hot(values: Tensor) -> Tensor:
    best = values.argmax(-1, keepdim=True)
    hard = torch.zeros_like(values).scatter(-1, best, 1.0)
    # argmax points at a nan, and at the first of several infinities
    winner = values.gather(-1, best)
    return torch.where(winner.isnan() | (winner == -torch.inf), torch.nan, hard)


def _heun(logits: Tensor, hard: Tensor) -> Tensor:
    """2 softmax' at the mean of outcome and probability, less half of softmax' at the logits."""
    plain = torch.softmax(logits, -1)
    middle = (hard.detach() + plain.detach()) / 2
    # zero in value, the logits to autograd, also where a logit is infinite
    finite = torch.where(logits.detach().isinf(), 0.0, logits)
    moved = torch.softmax(torch.log(middle) + (finite - finite.detach()), -1)
    return 2 * moved - plain / 2
