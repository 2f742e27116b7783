"""The minimum-variance baseline of each unit, kept as two moving averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.errors import ArgumentError, require_positive
from thalweg.score import quotient, squared_scores


class MinimumVariance(nn.Module):
    """The baseline E[(h-p)^2 L] / E[(h-p)^2] of each unit, from moving averages over past batches.

    Choose it for `ScoreFunction(baseline=MinimumVariance())` when batches are too small for
    `baseline="minimum_variance"`, which takes the other examples of the batch. A batch is centred by the
    averages *before* it, so no bias arises; the first batch is centred by nothing.

    Both averages are buffers, one pair per unit call of the closure, made at the first batch: keep the module
    (say as `model.baseline`) and it travels in `state_dict`. A closure must run its units in the same order
    every time.

    Args:
        momentum: share of the past in each average, above 0 and below 1; the paper's code has 0.9.

    Raises:
        ArgumentError, ArgumentTypeError: the momentum is out of range, or a unit changed its shape.

    Paper:
        Bengio, Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation. arXiv 1308.3432, 2013.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic import BinaryNeuron, ScoreFunction
        >>> logits, unit = torch.zeros(8, 3, requires_grad=True), BinaryNeuron(gradient=None)
        >>> rule = ScoreFunction(baseline=MinimumVariance())
        >>> loss = backward(lambda: unit(logits).sum(1) + 5, [logits], gradient=rule)
        >>> sorted(rule.baseline.state_dict())
        ['denominator_0', 'numerator_0']
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        require_positive("momentum", momentum)
        if momentum >= 1:
            raise ArgumentError("momentum", momentum, "a number above 0 and below 1")
        self.momentum = momentum

    def of(self, index: int, score: Tensor) -> Tensor:
        """The baseline of unit call `index`, in the shape of a row of its `score`; zeros before any batch."""
        numerator = self._buffers.get(f"numerator_{index}")
        denominator = self._buffers.get(f"denominator_{index}")
        if numerator is None or denominator is None or isinstance(score, FakeTensor):
            return torch.zeros_like(score[0])
        if numerator.shape != score.shape[1:]:
            expected = f"units of shape {tuple(numerator.shape)} in unit call {index}, as before"
            mend = "Give each model, and each closure with other units, its own MinimumVariance()."
            raise ArgumentError("baseline", score[0], expected, mend)
        return quotient(numerator.to(score), denominator.to(score))

    def update(self, scores: Sequence[Tensor], losses: Tensor) -> None:
        """Move the averages towards a batch.

        Args:
            scores: one tensor of shape (batch, ...) per unit call.
            losses: shape (batch,).
        """
        for index, score in enumerate(scores):
            if isinstance(score, FakeTensor):
                continue
            for name, rows in zip(("numerator", "denominator"), squared_scores(score, losses)):
                old = self._buffers.get(f"{name}_{index}")
                if old is None:
                    old = torch.zeros_like(rows[0])
                    self.register_buffer(f"{name}_{index}", old)
                old.lerp_(rows.mean(0).to(old), 1 - self.momentum)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # a new module has no buffers yet: it takes those that come, whatever their shape
        for name, value in state_dict.items():
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and own.startswith(("numerator_", "denominator_")):
                self.register_buffer(own, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The fields, for printing."""
        return f"momentum={self.momentum}"
