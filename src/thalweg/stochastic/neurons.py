"""Binary units: a hard random decision forward, and a gradient of your choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thalweg import noise
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_floating,
    require_positive,
)
from thalweg.gates.straight_through import SLOPES, Slope, straight_through, with_gradient_of
from thalweg.stochastic import tape


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """Differentiate a hard unit as if a smooth function had run: costs nothing, biased, often good enough.

    Args:
        slope: "identity" passes the gradient unchanged (the paper's choice); "sigmoid" multiplies it by
            p (1 - p), p the probability of firing: exact in expectation where the loss is affine in the unit.
            `BinaryNeuron` and `SpikingNeuron` also take the surrogates "atan", "fast_sigmoid" and "triangle"
            of `thalweg.gates.straight_through`; `CategoricalNeuron` takes "identity" and "softmax", which
            multiplies by the softmax's Jacobian, as torch's `OneHotCategoricalStraightThrough` does.

    Raises:
        ArgumentError: an unknown slope.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013.

    Example:
        >>> StraightThrough(slope="sigmoid")
        StraightThrough(slope='sigmoid')
    """

    slope: Slope | Literal["softmax"] = "identity"

    def __post_init__(self) -> None:
        require_choice("slope", self.slope, (*SLOPES, "softmax"))


@dataclass(frozen=True, slots=True)
class Concrete:
    """Differentiate a binary unit through its relaxation: sigmoid((logit + logistic noise) / temperature).

    Choose it over `StraightThrough` where the gradient should know which way the coin fell and how close it
    came. With `hard=True` the unit is still 0 or 1 (straight-through Gumbel), the same bits as any other unit
    draws from the same key; with `hard=False` training sees the relaxed value, between 0 and 1, whose
    gradient is that of the relaxed problem without bias, and evaluation a hard one.

    Args:
        temperature: above 0; low is close to a coin and noisy, high is smooth and far from it.
        hard: whether training sees the decision or its relaxation.

    Raises:
        ArgumentTypeError, ArgumentError: a field out of range.

    Paper:
        Maddison, Mnih, Teh: The Concrete Distribution. ICLR 2017, arXiv 1611.00712. Jang, Gu, Poole:
        Categorical Reparameterization with Gumbel-Softmax. ICLR 2017, arXiv 1611.01144.

    Example:
        >>> bits = BinaryNeuron(gradient=Concrete(temperature=0.5))(torch.zeros(1000))
        >>> sorted(set(bits.tolist()))
        [0.0, 1.0]
    """

    temperature: float = 1.0
    hard: bool = True

    def __post_init__(self) -> None:
        require_positive("temperature", self.temperature)
        if not isinstance(self.hard, bool):
            raise ArgumentTypeError("hard", self.hard, "True or False")


_DEFAULT = StraightThrough()


class BinaryNeuron(nn.Module):
    """Turn logits into zeros and ones: Bernoulli(sigmoid(logits)) in training, a threshold in evaluation.

    The draws take their keys from torch's default CPU generator, so `torch.manual_seed` governs them, and
    `torch.utils.checkpoint`, a second backward and `torch.compile` see the same bits. Supports, with
    `StraightThrough` and `Concrete`, `vmap`, second derivatives and forward mode (those of the smooth
    stand-in), autocast and `compile(fullgraph=True)`; with None, compilation for inference. A logit that is
    nan comes out as nan, not as a decision.

    Args:
        gradient: `StraightThrough()` and `Concrete()` work under a plain `loss.backward()`. None leaves the
            gradient to `thalweg.backward(..., gradient=ScoreFunction())` or `Enumeration()`; a plain backward
            through the unit is then refused.
        threshold: in evaluation mode the unit is 1 where its logit lies above this.

    Attributes:
        steepness: with a slope other than "identity", a buffer (so in `state_dict`) that starts at 1: the
            gradient is that of sigmoid(steepness * logit). See `anneal`. Else None.

    Shape:
        Input and output any shape, floating point, the same dtype.

    Raises:
        ArgumentTypeError: `gradient` is none of these, or logits are not floating point.
        ArgumentError: the threshold is nan, above which nothing lies, or the slope is "softmax".
        UnsupportedError: derivatives of a unit with `gradient=None` outside of an estimator.

    Example:
        >>> logits = torch.zeros(1000, requires_grad=True)
        >>> bits = BinaryNeuron()(logits)
        >>> sorted(set(bits.tolist()))
        [0.0, 1.0]
        >>> bits.sum().backward(); logits.grad[:3]
        tensor([1., 1., 1.])
    """

    steepness: Tensor | None

    def __init__(
        self, gradient: StraightThrough | Concrete | None = _DEFAULT, threshold: float = 0.0
    ) -> None:
        super().__init__()
        if gradient is not None and not isinstance(gradient, StraightThrough | Concrete):
            mend = "ScoreFunction() and the like go to thalweg.backward, with gradient=None here."
            raise ArgumentTypeError("gradient", gradient, "StraightThrough(), Concrete() or None", mend)
        slope = gradient.slope if isinstance(gradient, StraightThrough) else "identity"
        if slope == "softmax":
            mend = "The softmax over two categories is the slope 'sigmoid'."
            raise ArgumentError("gradient", gradient, "a slope of one unit", mend)
        self.gradient = gradient
        self.threshold = checked_threshold(threshold)
        self.register_buffer("steepness", None if slope == "identity" else torch.ones(()))

    def forward(self, logits: Tensor, threshold: Tensor | float | None = None) -> Tensor:
        """Decide; `logits` and the result have the same shape and dtype.

        Args:
            logits: floating-point tensor of any shape.
            threshold: in evaluation mode, instead of the unit's own; a tensor must broadcast.
        """
        require_floating("logits", logits)
        running = tape.current() if self.gradient is None and self.training else None
        if running is not None:
            return running.outcome(logits)
        if not self.training:
            hard, numbers = above(logits, self.threshold if threshold is None else threshold), None
        else:
            numbers = tape.uniform_numbers(logits, noise.fresh_key(logits))
            hard = tape.fires(logits, numbers)
        if isinstance(self.gradient, StraightThrough):
            slope: Any = self.gradient.slope
            return straight_through(logits, hard, slope, 1.0 if self.steepness is None else self.steepness)
        if isinstance(self.gradient, Concrete):
            relaxed = _relaxed(logits, numbers, self.gradient.temperature)
            soft = self.training and not self.gradient.hard
            return relaxed if soft else with_gradient_of(relaxed, hard)
        if torch.compiler.is_compiling() and not logits.requires_grad:
            return hard
        refused: Tensor = _Refused.apply(logits, hard)  # type: ignore[no-untyped-call]
        return refused

    def probability(self, logits: Tensor) -> Tensor:
        """The probability that training draws a 1, differentiable."""
        return torch.sigmoid(require_floating("logits", logits))

    def anneal(self, epoch: float, *, rate: float = 0.04, limit: float = 5.0) -> None:
        """Set `steepness` to min(limit, 1 + rate * epoch): call it once an epoch to let the bias shrink.

        Args:
            epoch: how many epochs have passed, at least 0.
            rate: growth of the steepness in an epoch, at least 0.
            limit: where the growth ends, above 0.

        Raises:
            UnsupportedError: the unit has no slope that could be steeper.
            ArgumentTypeError, ArgumentError: a number out of range.

        Paper:
            Chung, Ahn, Bengio: Hierarchical Multiscale Recurrent Neural Networks. ICLR 2017,
            arXiv 1609.01704.

        Example:
            >>> unit = BinaryNeuron(StraightThrough(slope="sigmoid"))
            >>> unit.anneal(epoch=50); unit.steepness
            tensor(3.)
        """
        if self.steepness is None:
            raise UnsupportedError(
                f"anneal: a unit with gradient={self.gradient} has no steepness; give it "
                "gradient=StraightThrough(slope='sigmoid')"
            )
        self.steepness.fill_(annealed(epoch, rate, limit))

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"gradient={self.gradient}, threshold={self.threshold}"


def annealed(epoch: float, rate: float, limit: float) -> float:
    """The steepness min(limit, 1 + rate * epoch), of checked numbers."""
    for name, value in (("epoch", epoch), ("rate", rate)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentTypeError(name, value, "a number of at least 0")
        if not 0 <= value < math.inf:
            raise ArgumentError(name, value, "a finite number of at least 0")
    require_positive("limit", limit)
    return min(limit, 1 + rate * epoch)


def checked_threshold(threshold: object) -> float:
    """The threshold of a unit in evaluation mode: any number but nan."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ArgumentTypeError("threshold", threshold, "a number")
    if math.isnan(threshold):
        raise ArgumentError("threshold", threshold, "a number, possibly infinite")
    return threshold


def above(logits: Tensor, threshold: Tensor | float) -> Tensor:
    """One where the logit lies above the threshold, else zero; nan where the logit is nan."""
    logits = logits.detach()
    return (logits > threshold).to(logits.dtype).masked_fill_(logits.isnan(), math.nan)


def _relaxed(logits: Tensor, numbers: Tensor | None, temperature: float) -> Tensor:
    if numbers is None:
        return torch.sigmoid(logits / temperature)
    # a unit fires where its number lies below sigmoid(logit), that is where logit > logit(number); a number
    # of 0 would be an infinite noise
    number = numbers.clamp(min=torch.finfo(numbers.dtype).tiny)
    relaxed = torch.sigmoid((logits.to(number.dtype) - torch.logit(number)) / temperature)
    return relaxed.to(logits.dtype)


class _Refused(torch.autograd.Function):
    """A decision whose derivative nobody has provided for: an error instead of a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise UnsupportedError(_NO_GRADIENT)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        raise UnsupportedError(_NO_GRADIENT)


_NO_GRADIENT = (
    "BinaryNeuron(gradient=None) has no derivative of its own: call thalweg.backward(closure, parameters, "
    "gradient=ScoreFunction()) with losses per example and the unit in training mode, or give the unit "
    "gradient=StraightThrough()"
)
