"""What a block learns from and what it says: the local loss, and the plainest one, a linear classifier."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.errors import require_integer


@runtime_checkable
class LocalLoss(Protocol):
    """What a block learns from, and what it says in the end; a module of yours will do.

    It may have parameters, for example a readout; they learn in the phase of its block.
    """

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        """The loss of one block's output: a scalar, or one value per example."""
        ...

    def scores(self, output: Tensor) -> Tensor:
        """What the block says, for example probabilities (batch, classes); the stack sums over blocks."""
        ...


class Readout(nn.Module):
    """A linear classifier of its own on a block's output: deep supervision without a global backward.

    Choose it as the local loss when there are labels and nothing more exotic is wanted: the baseline that
    forward-only objectives have to beat.

    Args:
        features: numbers per example in the block's output.
        classes: at least 2.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument.

    Example:
        >>> local = Readout(8, 3)
        >>> local(torch.ones(5, 8), torch.tensor([0, 1, 2, 0, 1])).shape, local.scores(torch.ones(5, 8)).shape
        (torch.Size([5]), torch.Size([5, 3]))
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        require_integer("features", features, 1)
        require_integer("classes", classes, 2)
        self.linear = nn.Linear(features, classes)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of each example, shape (batch,)."""
        logits: Tensor = self.linear(output.flatten(1))
        return F.cross_entropy(logits, target, reduction="none")

    def scores(self, output: Tensor) -> Tensor:
        """Probabilities, shape (batch, classes)."""
        logits: Tensor = self.linear(output.flatten(1))
        return logits.softmax(1)


def unit_length(x: Tensor) -> Tensor:
    """Divide each example by its Euclidean length plus 1e-8; zeros stay zeros.

    Example:
        >>> unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
    shortened: Tensor = x / (length + 1e-8)
    return shortened


def unit_mean_square(x: Tensor) -> Tensor:
    """Divide each example by the root of its mean square, plus 1e-8: the size does not depend on the width.

    Example:
        >>> unit_mean_square(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    numbers = max(x[0].numel(), 1) if len(x) else 1
    scaled: Tensor = unit_length(x) * numbers**0.5
    return scaled
