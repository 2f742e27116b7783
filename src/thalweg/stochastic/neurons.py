"""Binary units: a hard random decision forward, and a gradient of your choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thalweg import noise
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_floating,
)
from thalweg.gates.straight_through import Slope, straight_through
from thalweg.stochastic import tape


@dataclass(frozen=True, slots=True)
class StraightThrough:
    """Differentiate a hard unit as if a smooth function had run: costs nothing, biased, often good enough.

    Args:
        slope: "identity" passes the gradient unchanged (the paper's choice); "sigmoid" multiplies it by
            p (1 - p), p the probability of firing: exact in expectation where the loss is affine in the unit.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013.

    Example:
        >>> StraightThrough(slope="sigmoid")
        StraightThrough(slope='sigmoid')
    """

    slope: Slope = "identity"

    def __post_init__(self) -> None:
        require_choice("slope", self.slope, ("identity", "sigmoid"))


_DEFAULT = StraightThrough()


class BinaryNeuron(nn.Module):
    """Turn logits into zeros and ones: Bernoulli(sigmoid(logits)) in training, a threshold in evaluation.

    The draws take their keys from torch's default CPU generator, so `torch.manual_seed` governs them, and
    `torch.utils.checkpoint`, a second backward and `torch.compile` see the same bits. Supports, with
    `StraightThrough`, `vmap`, second derivatives and forward mode (those of the smooth stand-in), autocast
    and `compile(fullgraph=True)`; with None, compilation for inference. A logit that is nan comes out as nan,
    not as a decision.

    Args:
        gradient: `StraightThrough()` works under a plain `loss.backward()`. None leaves the gradient to
            `thalweg.backward(..., gradient=ScoreFunction())` or `Enumeration()`; a plain backward through the
            unit is then refused.
        threshold: in evaluation mode the unit is 1 where its logit lies above this.

    Shape:
        Input and output any shape, floating point, the same dtype.

    Raises:
        ArgumentTypeError: `gradient` is not one of the two, or logits are not floating point.
        ArgumentError: the threshold is nan, above which nothing lies.
        UnsupportedError: derivatives of a unit with `gradient=None` outside of an estimator.

    Example:
        >>> logits = torch.zeros(1000, requires_grad=True)
        >>> bits = BinaryNeuron()(logits)
        >>> sorted(set(bits.tolist()))
        [0.0, 1.0]
        >>> bits.sum().backward(); logits.grad[:3]
        tensor([1., 1., 1.])
    """

    def __init__(self, gradient: StraightThrough | None = _DEFAULT, threshold: float = 0.0) -> None:
        super().__init__()
        if gradient is not None and not isinstance(gradient, StraightThrough):
            mend = "ScoreFunction() and the like go to thalweg.backward, with gradient=None here."
            raise ArgumentTypeError("gradient", gradient, "StraightThrough() or None", mend)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise ArgumentTypeError("threshold", threshold, "a number")
        if math.isnan(threshold):
            raise ArgumentError("threshold", threshold, "a number, possibly infinite")
        self.gradient = gradient
        self.threshold = threshold

    def forward(self, logits: Tensor) -> Tensor:
        """Decide; `logits` and the result have the same shape and dtype."""
        require_floating("logits", logits)
        running = tape.current() if self.gradient is None and self.training else None
        if running is not None:
            return running.outcome(logits)
        if self.training:
            hard = tape.fires(logits, tape.uniform_numbers(logits, noise.fresh_key(logits)))
        else:
            hard = (logits.detach() > self.threshold).to(logits.dtype)
            hard = torch.where(logits.detach().isnan(), logits.detach(), hard)
        if self.gradient is not None:
            return straight_through(logits, hard, slope=self.gradient.slope)
        if torch.compiler.is_compiling() and not logits.requires_grad:
            return hard
        refused: Tensor = _Refused.apply(logits, hard)  # type: ignore[no-untyped-call]
        return refused

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"gradient={self.gradient}, threshold={self.threshold}"


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
