"""Score function (REINFORCE): learn random units from how each example's loss came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_choice
from thalweg.noise import Key
from thalweg.score import BASELINES, Baseline, bernoulli_score, centred
from thalweg.step import Closure, Estimate
from thalweg.stochastic.tape import Tape, recording


@dataclass(frozen=True, slots=True)
class ScoreFunction:
    """The unbiased gradient through random units, from one forward and one backward; noisy.

    Choose it when the bias of `StraightThrough` hurts, or when nothing after the units has a derivative.
    Every `BinaryNeuron(gradient=None)` that the closure runs in training mode takes part, in any number of
    layers. What lies downstream of the units gets the ordinary gradient of the mean loss; what lies upstream
    gets, for each unit, (outcome - probability) times the example's centred loss.

    Unbiased when the loss of one example depends on that example's units only. A BatchNorm in training mode
    *after* a unit mixes examples and adds a small bias.

    Args:
        baseline: subtracted from the losses upstream: "none", or "mean", the mean loss of the *other*
            examples of the batch (at least two), nearly always the better one. Neither adds bias.

    Raises:
        ArgumentError: an unknown baseline.

    Paper:
        Williams: Simple statistical gradient-following algorithms for connectionist reinforcement learning.
        Machine Learning 8, 1992; and Bengio, Léonard, Courville, arXiv 1308.3432, 2013.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits = torch.zeros(1, requires_grad=True)
        >>> unit = BinaryNeuron(gradient=None)
        >>> losses = lambda: (unit(logits.expand(10000)) - 1.0) ** 2
        >>> loss = backward(losses, [logits], gradient=ScoreFunction(baseline="mean"))
        >>> bool((logits.grad + 0.25).abs() < 0.02)
        True
    """

    baseline: Baseline = "none"

    def __post_init__(self) -> None:
        require_choice("baseline", self.baseline, BASELINES)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """One forward and one backward; draws from torch's default generator as every forward does.

        Raises:
            ArgumentError: the loss is a scalar, no unit with `gradient=None` ran in training mode, or the
                first dimension of a unit's logits is not the batch.
            UnsupportedError: such a unit ran under `torch.no_grad()`.
        """
        tape = Tape()
        with recording(tape):
            losses = tape.run(closure)
            precise = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
            signal = centred(precise, self.baseline) / len(losses)
            outputs, cotangents = [losses], [torch.full_like(losses, 1 / len(losses))]
            for logits, outcome in zip(tape.logits, tape.outcomes):
                outputs.append(logits)
                score = bernoulli_score(outcome, logits.detach())
                cotangents.append((score * per_example(signal, score)).to(logits.dtype))
            pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
            if not pairs:
                mend = "Neither the loss nor the logits of any unit require grad."
                raise ArgumentError("closure", losses, "losses that depend on the parameters", mend)
            gradients = torch.autograd.grad(
                [output for output, _ in pairs],
                list(parameters),
                [cotangent for _, cotangent in pairs],
                allow_unused=True,
            )
        return Estimate(precise.mean(), tuple(gradients), 1)


def per_example(signal: Tensor, like: Tensor) -> Tensor:
    """Shape one value per example, (batch,), so that it multiplies a tensor of shape (batch, ...)."""
    return signal.view(-1, *[1] * (like.ndim - 1))
