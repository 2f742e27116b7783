"""Score functions (derivatives of log-probabilities) and baselines, of which estimators are made.

With a random outcome y and a loss L(y), the gradient of E[L] is E[score(y) * (L(y) - baseline)] for every
baseline that does not depend on y.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_choice, require_floating, require_positive

Baseline = Literal["none", "mean"]
BASELINES = ("none", "mean")


def bernoulli_log_probability(outcome: Tensor, logits: Tensor) -> Tensor:
    """The log-probability of outcomes 0 or 1 under Bernoulli(sigmoid(logits)), element by element.

    Args:
        outcome: tensor of zeros and ones, any shape.
        logits: floating-point tensor of the same shape; differentiable, and finite where sigmoid saturates.

    Example:
        >>> bernoulli_log_probability(torch.tensor([0.0, 1.0]), torch.zeros(2)).exp()
        tensor([0.5000, 0.5000])
    """
    _same_shape("outcome", outcome, require_floating("logits", logits))
    return torch.nn.functional.logsigmoid((2 * outcome - 1) * logits)


def bernoulli_score(outcome: Tensor, logits: Tensor) -> Tensor:
    """The derivative of `bernoulli_log_probability` with respect to the logits: outcome - sigmoid(logits).

    Example:
        >>> bernoulli_score(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([-0.5000,  0.5000])
    """
    _same_shape("outcome", outcome, require_floating("logits", logits))
    return outcome - torch.sigmoid(logits)


def gaussian_score(outcome: Tensor, mean: Tensor, scale: float | Tensor) -> Tensor:
    """The derivative of log N(outcome; mean, scale^2) with respect to the mean: (outcome - mean) / scale^2.

    Args:
        outcome: tensor of any shape.
        mean: floating-point tensor of the same shape.
        scale: standard deviation, above 0; a number, or a tensor that broadcasts (whose values are not
            checked, which would make the device wait).

    Raises:
        ArgumentTypeError, ArgumentError: not floating point, other shapes, or a scale that is not above 0.

    Example:
        >>> gaussian_score(torch.tensor([3.0]), torch.tensor([1.0]), scale=2.0)
        tensor([0.5000])
    """
    _same_shape("outcome", outcome, require_floating("mean", mean))
    if not isinstance(scale, Tensor):
        require_positive("scale", scale)
    return (outcome - mean) / scale**2


def centred(losses: Tensor, baseline: Baseline = "none") -> Tensor:
    """Subtract a baseline from each loss that does not depend on the loss itself, so that no bias arises.

    Args:
        losses: one loss per example, shape (batch,).
        baseline: "none" subtracts nothing; "mean" subtracts the mean loss of the *other* examples, which
            takes out what all losses have in common. Needs at least two examples.

    Returns:
        A tensor of shape (batch,).

    Raises:
        ArgumentError: not a vector, an unknown baseline, or "mean" with a single example.

    Example:
        >>> centred(torch.tensor([1.0, 2.0, 6.0]), "mean")
        tensor([-3.0000, -1.5000,  4.5000])
    """
    require_choice("baseline", baseline, BASELINES)
    if require_floating("losses", losses).ndim != 1:
        raise ArgumentError("losses", losses, "one loss per example, shape (batch,)")
    if baseline == "none":
        return losses
    if len(losses) < 2:
        mend = "With one example there are no others: use baseline='none'."
        raise ArgumentError("losses", losses, "at least two examples for baseline='mean'", mend)
    return (losses - losses.mean()) * (len(losses) / (len(losses) - 1))


def _same_shape(name: str, tensor: Tensor, other: Tensor) -> None:
    if require_floating(name, tensor).shape != other.shape:
        raise ArgumentError(name, tensor, f"shape {tuple(other.shape)}")
