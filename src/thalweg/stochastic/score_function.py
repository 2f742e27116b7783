"""Score function (REINFORCE): learn random units from how each example's loss came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice, require_integer
from thalweg.noise import Key, replayed
from thalweg.score import (
    BASELINES,
    Baseline,
    bernoulli_score,
    centred,
    leave_one_out,
    minimum_variance_baseline,
)
from thalweg.step import Closure, Estimate
from thalweg.stochastic.minimum_variance import MinimumVariance
from thalweg.stochastic.tape import Tape, per_example, precise


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
        baseline: what is subtracted from the losses upstream; none of these adds bias.
            "none": nothing.
            "mean": the mean loss of the *other* examples of the batch (at least two): costs nothing, and is
            nearly always better than nothing.
            "minimum_variance": for each unit its own, E[(h-p)^2 L] / E[(h-p)^2], from the other examples of
            the batch (at least two). A `MinimumVariance()` module keeps it as moving averages instead, as the
            paper does: less noisy in small batches.
            "leave_one_out": the mean of the example's losses in the *other* of at least two `samples`: the
            best, at as many evaluations.
        samples: runs of the closure whose estimates are averaged, at least 1; they draw the units anew and
            share all other random numbers (dropout masks). Their graphs are kept until the last.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown baseline, or too few samples.

    Paper:
        Williams: Simple statistical gradient-following algorithms for connectionist reinforcement learning.
        Machine Learning 8, 1992; Bengio, Léonard, Courville, arXiv 1308.3432, 2013; and Kool, van Hoof,
        Welling: Buy 4 REINFORCE samples, get a baseline for free! 2019.

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

    baseline: Baseline | MinimumVariance = "none"
    samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.baseline, type):
            mend = f"Make one: {self.baseline.__name__}()."
            raise ArgumentTypeError("baseline", self.baseline, "a name or a MinimumVariance()", mend)
        if not isinstance(self.baseline, MinimumVariance):
            require_choice("baseline", self.baseline, BASELINES)
        require_integer("samples", self.samples, 1)
        if self.baseline == "leave_one_out" and self.samples < 2:
            mend = "A single run has no others: ScoreFunction('leave_one_out', samples=2)."
            raise ArgumentError("samples", self.samples, "at least 2 for baseline='leave_one_out'", mend)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """`samples` forwards and backwards; draws from torch's default generator as every forward does.

        Raises:
            ArgumentError: the loss is a scalar, no unit with `gradient=None` ran in training mode, or the
                first dimension of a unit's logits is not the batch.
            UnsupportedError: such a unit ran under `torch.no_grad()`.
        """
        run = replayed(closure, [parameter.device for parameter in parameters])
        # the first run draws the bits of a plain forward, the others their own
        tapes = [Tape(salt=Key(0, call=index).bits() if index else 0) for index in range(self.samples)]
        losses = [tape.run(run) for tape in tapes]
        values = torch.stack([precise(each) for each in losses])
        signals = list(leave_one_out(values)) if self.baseline == "leave_one_out" else list(values)
        if self.baseline == "mean":
            signals = [centred(signal, "mean") for signal in signals]
        totals: tuple[Tensor | None, ...] = (None,) * len(parameters)
        weight = 1 / values.numel()
        scores = [[bernoulli_score(o, a.detach()) for o, a in zip(t.outcomes, t.logits)] for t in tapes]
        for tape, loss, signal, own in zip(tapes, losses, signals, scores):
            upstream = [weight * score * self._centred(i, score, signal) for i, score in enumerate(own)]
            cotangents = [torch.full_like(loss, weight), *upstream]
            found = tape.pull([loss, *tape.logits], cotangents, parameters)
            totals = tuple(add(total, part) for total, part in zip(totals, found))
        if isinstance(self.baseline, MinimumVariance):
            for own, signal in zip(scores, signals):
                self.baseline.update(own, signal)
        return Estimate(values.mean(), totals, self.samples)

    def _centred(self, index: int, score: Tensor, signal: Tensor) -> Tensor:
        """The losses less the baseline of each unit of call `index`, in a shape that multiplies its score."""
        rows = per_example(signal, score)
        if isinstance(self.baseline, MinimumVariance):
            return rows - self.baseline.of(index, score)
        if self.baseline == "minimum_variance":
            return rows - minimum_variance_baseline(score, signal, others=True)
        return rows


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be missing."""
    if total is None or part is None:
        return part if total is None else total
    return total + part
