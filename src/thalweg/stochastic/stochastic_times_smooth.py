"""Stochastic times smooth: a coin says whether, a smooth factor how much, which alone is differentiated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thalweg import noise
from thalweg.errors import require_floating, require_positive
from thalweg.gates import scale as scale_gate
from thalweg.stochastic import tape
from thalweg.stochastic.neurons import above, checked_threshold
from thalweg.stochastic.noisy_rectifier import fraction


class StochasticTimesSmooth(nn.Module):
    """Turn logits into coin * p^(1 - r), p = sigmoid(logits), the coin being 1 with probability p^r.

    Choose it for gates with exact zeros that equal p on average and need no estimator: the coin is a constant
    to back-propagation, which flows through the smooth factor alone. That gradient is biased even where the
    loss is linear in the unit: there it is (1 - r) times the true one, half of it for the paper's r = 1/2,
    which `scale=1 / (1 - r)` makes exact.

    In evaluation mode it is p^(1 - r) where the logit lies above the threshold, else zero. Keys, transforms
    and dtypes as in `BinaryNeuron` with `StraightThrough`: the same bits under checkpointing, a second
    backward and `torch.compile`; `vmap`, forward mode (tangents are scaled, too) and autocast work.

    Args:
        scale: what the gradient is multiplied with, above 0: 1 is the paper's, 2 exact for linear losses at
            r = 1/2. The value does not change.
        exponent: r, between 0 and 1.
        threshold: on the logits, in evaluation mode.

    Shape:
        Input and output any shape, floating point, the same dtype.

    Raises:
        ArgumentTypeError, ArgumentError: a wrong argument, or logits that are not floating point.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013, section 3.1.

    Example:
        >>> values = StochasticTimesSmooth()(torch.zeros(10000))
        >>> sorted(set(round(value, 4) for value in values.tolist()))
        [0.0, 0.7071]
        >>> bool((values.mean() - 0.5).abs() < 0.02)
        True
    """

    def __init__(self, scale: float = 1.0, exponent: float = 0.5, threshold: float = 0.0) -> None:
        super().__init__()
        require_positive("scale", scale)
        self.scale = scale
        self.exponent = fraction("exponent", exponent)
        self.threshold = checked_threshold(threshold)

    def forward(self, logits: Tensor, threshold: Tensor | float | None = None) -> Tensor:
        """Draw; `threshold` replaces, in evaluation mode, the unit's own."""
        require_floating("logits", logits)
        if self.training:
            numbers = tape.uniform_numbers(logits, noise.fresh_key(logits))
            logarithm = torch.nn.functional.logsigmoid(logits.to(numbers.dtype))
            coin = (numbers < torch.exp(self.exponent * logarithm.detach())).to(logits.dtype)
        else:
            logarithm = torch.nn.functional.logsigmoid(logits)
            coin = above(logits, self.threshold if threshold is None else threshold)
        smooth = torch.exp((1 - self.exponent) * logarithm).to(logits.dtype)
        return coin * (smooth if self.scale == 1 else scale_gate(smooth, self.scale))

    def probability(self, logits: Tensor) -> Tensor:
        """The probability that training draws a value above zero, p^r, differentiable."""
        return torch.exp(self.exponent * torch.nn.functional.logsigmoid(require_floating("logits", logits)))

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"scale={self.scale}, exponent={self.exponent}, threshold={self.threshold}"
