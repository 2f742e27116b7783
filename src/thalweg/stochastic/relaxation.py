"""The logistic variable behind a binary unit: drawn freely, and drawn anew given how the unit came out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def relaxation(logits: Tensor, numbers: Tensor) -> Tensor:
    """The logistic variable whose sign is the unit: above zero where the number lies below sigmoid(logits).

    Args:
        logits: floating point, any shape; differentiable.
        numbers: uniform on [0, 1), the same shape.

    Example:
        >>> relaxation(torch.tensor([0.0, 0.0]), torch.tensor([0.25, 0.75])) > 0
        tensor([ True, False])
    """
    return logits - _log_odds(numbers)


def conditional_relaxation(logits: Tensor, outcome: Tensor, numbers: Tensor) -> Tensor:
    """A draw of `relaxation` given its sign; differentiable in the logits through all that depends on them.

    With the ratio of the odds written out there is no difference of near numbers: where a unit is one, z is
    softplus(log-odds of the number - log(1 - p)); where it is zero, its mirror image.

    Args:
        logits: floating point, any shape; differentiable.
        outcome: zeros and ones, the same shape and dtype.
        numbers: uniform on [0, 1), independent of the outcome.

    Example:
        >>> conditional_relaxation(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.full((2,), 0.5))
        tensor([ 1.0986, -1.0986])
    """
    sign = 2 * outcome - 1
    return sign * softplus(sign * _log_odds(numbers) - logsigmoid(-sign * logits))


def _log_odds(numbers: Tensor) -> Tensor:
    # a draw of 0 stands for the lower half of the first of the generator's 1 / eps * 2 cells
    numbers = numbers.clamp(min=torch.finfo(numbers.dtype).eps / 4)
    return numbers.log() - torch.log1p(-numbers)
