"""Score functions (derivatives of log-probabilities) and baselines, of which estimators are made.

With a random outcome y and a loss L(y), the gradient of E[L] is E[score(y) * (L(y) - baseline)] for every
baseline that does not depend on y.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, require_choice, require_floating, require_positive

Baseline = Literal["none", "mean", "minimum_variance", "leave_one_out"]
BASELINES = ("none", "mean", "minimum_variance", "leave_one_out")


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


def centred(losses: Tensor, baseline: Literal["none", "mean"] = "none") -> Tensor:
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
    require_choice("baseline", baseline, ("none", "mean"))
    if require_floating("losses", losses).ndim != 1:
        raise ArgumentError("losses", losses, "one loss per example, shape (batch,)")
    if baseline == "none":
        return losses
    if len(losses) < 2:
        mend = "With one example there are no others: use baseline='none'."
        raise ArgumentError("losses", losses, "at least two examples for baseline='mean'", mend)
    return (losses - losses.mean()) * (len(losses) / (len(losses) - 1))


def leave_one_out(losses: Tensor) -> Tensor:
    """Subtract from each loss of an example the mean of the example's losses in the other runs.

    Args:
        losses: losses of several runs, shape (runs, batch), with at least two runs.

    Returns:
        A tensor of shape (runs, batch).

    Raises:
        ArgumentTypeError, ArgumentError: not floating point, not of two dimensions, or a single run.

    Paper:
        Kool, van Hoof, Welling: Buy 4 REINFORCE samples, get a baseline for free! ICLR workshop, 2019.

    Example:
        >>> leave_one_out(torch.tensor([[1.0], [2.0], [6.0]])).flatten()
        tensor([-3.0000, -1.5000,  4.5000])
    """
    if require_floating("losses", losses).ndim != 2 or len(losses) < 2:
        raise ArgumentError("losses", losses, "the losses of at least two runs, shape (runs, batch)")
    return (losses - losses.mean(0)) * (len(losses) / (len(losses) - 1))


def minimum_variance_baseline(
    score: Tensor, losses: Tensor, chances: Tensor | None = None, *, others: bool = False
) -> Tensor:
    """The baseline of each unit under which the score function varies least: E[score^2 L] / E[score^2].

    Where the units are many and each is one of the reasons of a loss, every unit wants its own baseline. Of a
    single unit it is (1 - p) L(1) + p L(0), under which both outcomes give the same estimate.

    Args:
        score: derivative of the log-probability with respect to the logit of each unit, shape (batch, ...).
        losses: one per row, shape (batch,).
        chances: weight of each row in the expectation, shape (batch,), positive; None for equal weights.
        others: leave each row out of its own baseline, which then adds no bias; at least two rows.

    Returns:
        One baseline per unit, of shape (...); with `others` one per row and unit, of shape (batch, ...).
        Where a unit's scores are all zero it is zero.

    Raises:
        ArgumentTypeError, ArgumentError: not floating point, shapes that do not fit, or too few rows.

    Paper:
        Bengio, Léonard, Courville, arXiv 1308.3432, 2013, section 4.

    Example:
        >>> p = torch.sigmoid(torch.tensor(1.0))
        >>> outcomes = torch.tensor([[0.0], [1.0]])
        >>> score = bernoulli_score(outcomes, torch.ones(2, 1))
        >>> best = minimum_variance_baseline(score, torch.tensor([3.0, 5.0]), torch.stack([1 - p, p]))
        >>> bool(torch.isclose(best[0], (1 - p) * 5 + p * 3))
        True
    """
    numerator, denominator = squared_scores(score, losses, chances)
    if others and len(score) < 2:
        mend = "With one example there are no others: use another baseline."
        raise ArgumentError("score", score, "at least two rows", mend)
    if others:
        return quotient(_sum_of_others(numerator), _sum_of_others(denominator))
    return quotient(numerator.sum(0), denominator.sum(0))


def _sum_of_others(rows: Tensor) -> Tensor:
    # added up from both ends: the total less the own row would leave rounding where the own row dominates
    nothing = torch.zeros_like(rows[:1])
    before = torch.cat([nothing, rows[:-1]]).cumsum(0)
    after = torch.cat([rows[1:], nothing]).flip(0).cumsum(0).flip(0)
    return before + after


def squared_scores(score: Tensor, losses: Tensor, chances: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two quantities whose means make `minimum_variance_baseline`: score^2 L and score^2, row by row.

    Arguments, errors and example as there; both results have the shape of `score`.
    """
    require_floating("losses", losses)
    if require_floating("score", score).ndim < 1 or losses.shape != score.shape[:1]:
        expected = f"one loss per row of the score, whose shape is {tuple(score.shape)}"
        raise ArgumentError("losses", losses, expected)
    weights = torch.ones_like(losses) if chances is None else chances
    _same_shape("chances", weights, losses)
    rows = (-1, *[1] * (score.ndim - 1))
    squares = score**2 * weights.view(rows)
    return squares * losses.view(rows), squares


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 for what has no denominator: a unit whose scores are all zero needs no baseline."""
    some = denominator > 0
    return torch.where(some, numerator / torch.where(some, denominator, 1.0), 0.0)


def _same_shape(name: str, tensor: Tensor, other: Tensor) -> None:
    if require_floating(name, tensor).shape != other.shape:
        raise ArgumentError(name, tensor, f"shape {tuple(other.shape)}")
