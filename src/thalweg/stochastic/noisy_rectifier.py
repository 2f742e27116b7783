"""Noisy rectifier: noise switches it on and off, and back-propagation differentiates it as it is."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from thalweg import noise
from thalweg.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
    require_choice,
    require_floating,
    require_integer,
    require_positive,
)
from thalweg.stochastic import tape
from thalweg.stochastic.neurons import checked_threshold


class NoisyRectifier(nn.Module):
    """Turn logits a into max(0, a + noise) in training and max(0, a - threshold) in evaluation.

    Choose it for gates that say how much as well as whether: exact zeros, a gradient with no bias at no cost,
    but no gradient at all through a gate that is closed, so that a unit may die; see `revive_`. With logistic
    noise of scale 1 a unit fires with probability sigmoid(a), and is softplus(a) on average.

    Keys, transforms and dtypes as in `BinaryNeuron` with `StraightThrough`: the same noise under
    checkpointing, a second backward and `torch.compile`; `vmap`, forward mode and autocast work. Without the
    noise fewer units are open: evaluation needs a threshold below zero (`ConditionalLinear.calibrate`) to
    keep the fraction of training.

    Args:
        noise: "gaussian" (what the paper trained with) or "logistic".
        scale: of the noise, above 0: the standard deviation of the gaussian, the scale of the logistic.
        threshold: in evaluation mode, the shift of the bias.
        units: size of the last dimension, at least 1, for a unit that counts how often each one fires; None
            counts nothing.

    Attributes:
        rate: with `units`, a buffer of shape (units,): the moving average of the fraction of examples on
            which each unit was above zero, starting at 1. Only `revive_` changes it.

    Shape:
        Input and output any shape, floating point, the same dtype.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument, or logits that are not floating point.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013, section 3.

    Example:
        >>> unit = NoisyRectifier()
        >>> bool((unit(torch.zeros(10000)) == 0).double().mean().sub(0.5).abs() < 0.03)
        True
        >>> unit.eval()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    rate: Tensor | None

    def __init__(
        self,
        noise: Literal["gaussian", "logistic"] = "gaussian",
        scale: float = 1.0,
        threshold: float = 0.0,
        units: int | None = None,
    ) -> None:
        super().__init__()
        require_choice("noise", noise, ("gaussian", "logistic"))
        require_positive("scale", scale)
        if units is not None:
            require_integer("units", units, 1)
        self.noise = noise
        self.scale = scale
        self.threshold = checked_threshold(threshold)
        self.register_buffer("rate", None if units is None else torch.ones(units))

    def forward(self, logits: Tensor, threshold: Tensor | float | None = None) -> Tensor:
        """Rectify; `threshold` replaces, in evaluation mode, the unit's own."""
        require_floating("logits", logits)
        if not self.training:
            return torch.relu(logits - (self.threshold if threshold is None else threshold))
        key = noise.fresh_key(logits)
        if self.noise == "gaussian":
            like = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            drawn = noise.normal(like, key)
        else:
            numbers = tape.uniform_numbers(logits, key)
            drawn = -torch.logit(numbers.clamp(min=torch.finfo(numbers.dtype).tiny))
        rectified: Tensor = torch.relu(torch.add(logits, drawn, alpha=self.scale)).to(logits.dtype)
        return rectified

    def probability(self, logits: Tensor) -> Tensor:
        """The probability that training draws a value above zero, differentiable."""
        scaled: Tensor = require_floating("logits", logits) / self.scale
        if self.noise == "logistic":
            return torch.sigmoid(scaled)
        below: Tensor = torch.special.ndtr(scaled)
        return below

    def mean(self, logits: Tensor) -> Tensor:
        """The expected output in training, differentiable."""
        scaled = require_floating("logits", logits) / self.scale
        if self.noise == "logistic":
            return self.scale * torch.nn.functional.softplus(scaled)
        density = torch.exp(-0.5 * scaled**2) / math.sqrt(2 * math.pi)
        mean: Tensor = self.scale * (scaled * torch.special.ndtr(scaled) + density)
        return mean

    @torch.no_grad()
    def revive_(
        self,
        bias: Tensor,
        outputs: Tensor,
        *,
        target: float = 0.05,
        step: float = 0.01,
        momentum: float = 0.9,
    ) -> None:
        """Nudge up the bias of the units that fire too seldom: call it after each step of the optimizer.

        Args:
            bias: of the layer that makes the logits, shape (units,); changed in place.
            outputs: what the unit returned for the batch, shape (..., units).
            target: a unit whose `rate` lies below this is nudged; between 0 and 1.
            step: how far its bias moves up, above 0.
            momentum: of the moving average `rate`, at least 0 and below 1.

        Raises:
            UnsupportedError: the unit was made without `units`.
            ArgumentTypeError, ArgumentError: a wrong shape or a number out of range.

        Example:
            >>> layer, unit = nn.Linear(3, 2), NoisyRectifier(units=2)
            >>> _ = layer.bias.data.copy_(torch.tensor([-50.0, 50.0]))
            >>> for _ in range(30):
            ...     unit.revive_(layer.bias, unit(layer(torch.zeros(8, 3))))
            >>> layer.bias.data
            tensor([-49.9800,  50.0000])
        """
        if self.rate is None:
            raise UnsupportedError("revive_: the unit counts nothing; make it NoisyRectifier(units=...)")
        for name, tensor in (("bias", bias), ("outputs", outputs)):
            require_floating(name, tensor)
        if bias.shape != self.rate.shape:
            raise ArgumentError("bias", bias, f"shape {tuple(self.rate.shape)}")
        if not outputs.ndim or outputs.shape[-1:] != self.rate.shape or not outputs.numel():
            raise ArgumentError("outputs", outputs, f"at least one row of {len(self.rate)} units")
        fraction("target", target)
        fraction("momentum", momentum, closed=True)
        require_positive("step", step)
        fired = (outputs > 0).reshape(-1, len(self.rate)).to(self.rate.dtype).mean(0)
        self.rate.lerp_(fired, 1 - momentum)
        bias.add_((self.rate < target).to(bias.dtype), alpha=step)

    def extra_repr(self) -> str:
        """The fields, for printing."""
        units = "" if self.rate is None else f", units={len(self.rate)}"
        return f"noise={self.noise!r}, scale={self.scale}, threshold={self.threshold}{units}"


def fraction(argument: str, value: object, closed: bool = False) -> float:
    """A number above 0 (with `closed`, at least 0) and below 1; refused by name otherwise."""
    expected = "a number of at least 0 and below 1" if closed else "a number above 0 and below 1"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(argument, value, expected)
    if not (0 <= value < 1 if closed else 0 < value < 1):
        raise ArgumentError(argument, value, expected)
    return value
