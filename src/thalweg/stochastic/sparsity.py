"""Sparsity: costs that keep a chosen fraction of a layer's gates open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import require_positive
from thalweg.stochastic.noisy_rectifier import fraction


class KLSparsity(nn.Module):
    """The cross-entropy between a target and each gate's mean probability over the batch, summed over gates.

    Choose it for gates that fire with a probability (`BinaryNeuron`, `StochasticTimesSmooth`). The mean is
    over the batch: a cost on each example's own probability would push every gate to the target on every
    example, and no gate would decide anything. The weight is fixed: where the loss pulls hard, the fraction
    settles between the two.

    Args:
        target: the fraction of examples on which a gate is to be open, between 0 and 1.
        weight: of the cost, above 0. The paper's scripts: 0.1 with straight-through, 0.001 with
            stochastic-times-smooth, 1 with the score function.

    Raises:
        ArgumentTypeError, ArgumentError: a number out of range.

    Paper:
        Bengio, Léonard, Courville, arXiv 1308.3432, 2013, appendix A.

    Example:
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits = torch.zeros(8, 3)
        >>> KLSparsity(target=0.5, weight=1.0)(BinaryNeuron(), logits, torch.ones(8, 3))
        tensor(2.0794)
    """

    def __init__(self, target: float = 0.1, weight: float = 0.1) -> None:
        super().__init__()
        self.target = fraction("target", target)
        require_positive("weight", weight)
        self.weight = weight

    def forward(self, gate: Any, logits: Tensor, outputs: Tensor) -> Tensor:
        """The cost of one batch, a scalar: of the gates' logits; `outputs` plays no part."""
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mean: Tensor = gate.probability(precise).reshape(-1, logits.shape[-1]).mean(0)
        tiny = 1e-6
        opened = self.target * torch.log(mean + tiny)
        return -self.weight * (opened + (1 - self.target) * torch.log(1 - mean + tiny)).sum()

    def update_(self, active: Tensor) -> None:
        """Nothing to do: the weight is fixed."""

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"target={self.target}, weight={self.weight}"


class AdaptiveL1Sparsity(nn.Module):
    """The sum of the gates' magnitudes, under a weight that rises while too many gates are open.

    Choose it for `NoisyRectifier`. After each step the weight is multiplied by 1.1 when the batch's fraction
    of open gates lay above target + band, by 0.9 when it lay below target - band, and kept in [1e-13, 1]. The
    fraction is the noisy one of training.

    The cost can only close gates; what opens them is the loss. Where the loss has no use for that many, the
    weight falls to its floor and the fraction stays below the target: `NoisyRectifier.revive_` helps there.

    Args:
        target: fraction of the gates that are to be open, between 0 and 1.
        weight: to start with, above 0.
        band: how far from the target the fraction may lie before the weight moves, between 0 and 1.

    Attributes:
        weight: the weight now, a buffer.

    Raises:
        ArgumentTypeError, ArgumentError: a number out of range.

    Paper:
        Bengio, Léonard, Courville, arXiv 1308.3432, 2013, appendix A.

    Example:
        >>> sparsity = AdaptiveL1Sparsity(target=0.1, weight=0.5)
        >>> sparsity.update_(torch.tensor(0.3)); sparsity.weight
        tensor(0.5500)
    """

    weight: Tensor

    def __init__(self, target: float = 0.1, weight: float = 1e-5, band: float = 0.01) -> None:
        super().__init__()
        self.target = fraction("target", target)
        self.band = fraction("band", band)
        require_positive("weight", weight)
        self.register_buffer("weight", torch.tensor(float(weight)))

    def forward(self, gate: Any, logits: Tensor, outputs: Tensor) -> Tensor:
        """The cost of one batch, a scalar: of the gates' outputs; `logits` plays no part."""
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return self.weight * precise.abs().sum()

    @torch.no_grad()
    def update_(self, active: Tensor) -> None:
        """Move the weight by the rule, given the fraction of open gates (a scalar), without a device wait."""
        up = torch.where(active > self.target + self.band, 1.1, 1.0)
        self.weight.mul_(torch.where(active < self.target - self.band, 0.9, up)).clamp_(1e-13, 1.0)

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"target={self.target}, band={self.band}"
