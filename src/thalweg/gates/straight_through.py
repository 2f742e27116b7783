"""Straight-through: a hard value forward, the slope of a smooth stand-in backward."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    require_choice,
    require_floating,
    require_positive,
)

Slope = Literal["identity", "sigmoid", "atan", "fast_sigmoid", "triangle"]
SLOPES = ("identity", "sigmoid", "atan", "fast_sigmoid", "triangle")


def straight_through(
    logits: Tensor, hard: Tensor, slope: Slope = "identity", steepness: float | Tensor = 1.0
) -> Tensor:
    """Return `hard` exactly, and give `logits` the cotangent as if a smooth function had run instead.

    Choose it for anything with a jump (binary units, rounding, hashing, quantisation) when a biased gradient
    that costs nothing is good enough. The bias: the rest of the network is differentiated at the hard value,
    and the jump is replaced by the slope.

    It supports `torch.compile(fullgraph=True)`, `vmap`, `grad`, `jvp` (the tangent is that of the stand-in),
    autocast and second derivatives (those of the stand-in); what it returns is a tensor of its own, which may
    be changed in place.

    Args:
        logits: floating-point tensor of any shape; its values may be infinite.
        hard: tensor of the same shape, dtype and device; comes back bit for bit. Gets no gradient.
        slope: "identity" passes the cotangent unchanged (the paper's choice); "sigmoid" multiplies it by
            the derivative of sigmoid(steepness * logits), exact in expectation for a Bernoulli unit of
            steepness 1 whose loss is affine in it. The surrogates of spiking networks, with k = steepness:
            "atan" k/2 / (1 + (pi k x / 2)^2), "fast_sigmoid" 1 / (1 + k|x|)^2, "triangle" max(0, 1 - k|x|).
        steepness: above 0; a number, or a tensor with one element (for a schedule that must not recompile),
            which gets no gradient. "identity" takes no notice of it.

    Returns:
        A tensor equal to `hard`, whose gradient goes to `logits`.

    Raises:
        ArgumentTypeError: `logits` or `hard` is not a floating-point tensor, or `steepness` not a number.
        ArgumentError: shapes, dtypes or devices differ, an unknown `slope`, or a steepness out of range.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013. The surrogates: Neftci, Mostafa, Zenke: Surrogate
        Gradient Learning in Spiking Neural Networks. IEEE Signal Processing Magazine 36, 2019.

    Example:
        >>> logits = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> bits = straight_through(logits, (logits > 0).float())
        >>> (bits * torch.tensor([3.0, 5.0])).sum().backward()
        >>> bits.tolist(), logits.grad.tolist()
        ([0.0, 1.0], [3.0, 5.0])
    """
    require_floating("logits", logits)
    require_floating("hard", hard)
    require_choice("slope", slope, SLOPES)
    if hard.shape != logits.shape or hard.dtype != logits.dtype or hard.device != logits.device:
        expected = f"shape {tuple(logits.shape)}, {logits.dtype}, {logits.device} as the logits have"
        raise ArgumentError("hard", hard, expected, "Convert it with hard.to(logits).")
    return with_gradient_of(_stand_in(logits, slope, _checked(steepness, logits)), hard)


def _stand_in(x: Tensor, slope: Slope, steepness: float | Tensor) -> Tensor:
    """The function whose derivative is the slope, up to a constant; written so that autograd's derivative of
    it neither overflows nor cancels where x is large.
    """
    if slope == "identity":
        return x
    scaled = x if isinstance(steepness, float) and steepness == 1 else x * steepness
    if slope == "sigmoid":
        return torch.sigmoid(scaled)
    if slope == "atan":
        return torch.atan(scaled * (math.pi / 2)) / math.pi
    # -sign(x)/k, a constant to autograd: the absolute value without a derivative of zero at zero
    inverse = 1 / torch.as_tensor(steepness, dtype=x.dtype, device=x.device)
    side = torch.copysign(inverse, x.detach()).neg_()
    if slope == "fast_sigmoid":
        return side * torch.reciprocal(1 - x / side)
    return torch.relu(1 + x / side).square() * (side / 2)


def _checked(steepness: float | Tensor, logits: Tensor) -> float | Tensor:
    if isinstance(steepness, Tensor):
        if steepness.numel() != 1 or not steepness.is_floating_point():
            expected = "a number above 0, or a floating-point tensor with one element"
            raise ArgumentError("steepness", steepness, expected)
        # 0-dim and, where the logits have no dimensions either, of their dtype: it never widens them
        steepness = steepness.detach().reshape(())
        return steepness if logits.ndim else steepness.to(logits.dtype)
    if isinstance(steepness, bool) or not isinstance(steepness, int | float):
        raise ArgumentTypeError("steepness", steepness, "a number above 0, or a tensor with one element")
    require_positive("steepness", steepness)
    return float(steepness)


def with_gradient_of(smooth: Tensor, hard: Tensor) -> Tensor:
    """Return a new tensor with the bits of `hard` and the derivatives of `smooth`; same shape and dtype.

    The usual `hard + (smooth - smooth.detach())` makes nan of an infinite `smooth` and, when the compiler
    contracts the difference, no longer returns `hard`. Here the sum only carries the graph (and the batch
    dimensions of both under `vmap`), and its memory is then overwritten out of autograd's sight.
    """
    hard = hard.detach()
    out = smooth + hard
    out.detach().copy_(hard)
    return out


def round(x: Tensor) -> Tensor:
    """Round to the nearest integer (ties to even) with the gradient of the identity: for quantisation.

    Example:
        >>> round(torch.tensor([0.4, 1.6]))
        tensor([0., 2.])
    """
    return straight_through(x, torch.round(require_floating("x", x).detach()))


def sign(x: Tensor) -> Tensor:
    """Take -1 below zero and 1 from zero on, with the gradient of the identity: for hashing to two values.

    A nan stays nan: it is no decision.

    Example:
        >>> sign(torch.tensor([-0.3, 0.0, 2.0]))
        tensor([-1.,  1.,  1.])
    """
    x = require_floating("x", x)
    hard = torch.where(x.detach() < 0, -1.0, 1.0).to(x.dtype)
    return straight_through(x, torch.where(x.detach().isnan(), x.detach(), hard))


def threshold(logits: Tensor, slope: Slope = "identity", steepness: float | Tensor = 1.0) -> Tensor:
    """Take 1 where the logit is above zero, else 0: the deterministic twin of a Bernoulli unit, or a spike.

    `slope` and `steepness` as in `straight_through`. A nan stays nan: it is no decision.

    Example:
        >>> threshold(torch.tensor([-1.0, 0.5]), slope="sigmoid")
        tensor([0., 1.])
    """
    logits = require_floating("logits", logits)
    hard = (logits.detach() > 0).to(logits.dtype)
    hard = torch.where(logits.detach().isnan(), logits.detach(), hard)
    return straight_through(logits, hard, slope, steepness)
