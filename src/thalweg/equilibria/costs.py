"""What the output of an energy network costs: the thing that nudges it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, require_integer, require_positive


@runtime_checkable
class Cost(Protocol):
    """What a learner asks of a cost; a module of yours will do, with parameters of its own if it likes."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The cost of each example, shape (batch,); holomorphic in the output for holomorphic nudging."""
        ...

    def predict(self, output: Tensor) -> Tensor:
        """What the network answers, for example logits, from the output layer at rest."""
        ...


class SquaredError(nn.Module):
    """scale * |output - target|^2 per example; integer targets are taken as classes, one-hot.

    Args:
        scale: above 0. 1/2 is common; the original paper's code has 1, which doubles the force of a nudge.

    Example:
        >>> SquaredError()(torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
        tensor([0.5000])
    """

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        require_positive("scale", scale)
        self.scale = scale

    @property
    def curvature(self) -> float:
        """Its second derivative in each output."""
        return 2 * self.scale

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The cost of each example, shape (batch,)."""
        away = output - _as_output(output, target)
        # no absolute value: it has to be holomorphic
        return self.scale * (away * away).flatten(1).sum(1)

    def predict(self, output: Tensor) -> Tensor:
        """The output layer itself."""
        return output


class CrossEntropy(nn.Module):
    """The cross-entropy of a softmax read-out that is no part of the state.

    The read-out's weights are learned with the network's, from the nudged states.

    Args:
        features: units of the last layer.
        classes: number of classes.

    Paper:
        Laborieux and others: Scaling Equilibrium Propagation to Deep ConvNets. Frontiers in Neuroscience
        2021, arXiv 2006.03824.

    Example:
        >>> cost = CrossEntropy(4, 3)
        >>> cost(torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([5])
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        require_integer("features", features, 1)
        require_integer("classes", classes, 2)
        self.readout = nn.Linear(features, classes)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The cost of each example, shape (batch,)."""
        logits = self.predict(output)
        top = (logits.real if logits.is_complex() else logits).detach().amax(1, keepdim=True)
        log_sum = (logits - top).exp().sum(1).log() + top[:, 0]
        return log_sum - (logits * _as_output(logits, target)).sum(1)

    def predict(self, output: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        logits: Tensor = self.readout(output.flatten(1))
        return logits


def _as_output(output: Tensor, target: Tensor) -> Tensor:
    """The target in the shape of the output."""
    if not (target.is_floating_point() or target.is_complex()):
        if target.ndim != 1 or output.ndim != 2 or len(target) != len(output):
            raise ArgumentError("target", target, f"classes of shape ({len(output)},)")
        target = torch.nn.functional.one_hot(target.long(), output.shape[1])
    if target.shape != output.shape:
        raise ArgumentError("target", target, f"classes, or values of shape {tuple(output.shape)}")
    return target.to(output.dtype)
