"""Enumeration: the exact gradient through random binary units, by running every joint outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thalweg.errors import ArgumentError, UnsupportedError, require_integer
from thalweg.noise import Key, replayed
from thalweg.score import bernoulli_log_probability
from thalweg.step import Closure, Estimate
from thalweg.stochastic.score_function import add
from thalweg.stochastic.tape import Tape


@dataclass(frozen=True, slots=True)
class Enumeration:
    """The exact gradient of the expected loss over all outcomes of the units with `gradient=None`.

    Choose it as the reference for every other estimator on small networks: with K units per example the
    closure runs 2^K times. Other random numbers (dropout masks) are the same in all runs.

    Exact when the loss of one example depends on that example's units only; a BatchNorm in training mode,
    which mixes examples, is therefore refused.

    Args:
        limit: the largest number of units per example, counted over all layers and calls, at least 1.

    Raises:
        ArgumentError, ArgumentTypeError: a field out of range.

    Example:
        >>> from thalweg.step import backward
        >>> from thalweg.stochastic.neurons import BinaryNeuron
        >>> logits = torch.zeros(4, 1, requires_grad=True)
        >>> unit = BinaryNeuron(gradient=None)
        >>> loss = backward(lambda: 8 * unit(logits).sum(1), [logits], gradient=Enumeration())
        >>> loss, logits.grad.flatten()
        (tensor(4.), tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """

    limit: int = 12

    def __post_init__(self) -> None:
        require_integer("limit", self.limit, 1)

    def estimate(self, closure: Closure, parameters: Sequence[Tensor], key: Key) -> Estimate:
        """2^K evaluations, each with a forward and a backward; the loss is the expected one.

        Raises:
            ArgumentError: more units than the limit, a scalar loss, no unit with `gradient=None` in training
                mode, or the first dimension of a unit's logits is not the batch.
            UnsupportedError: the number of units depends on their outcomes, or a BatchNorm in training mode.
        """
        run = replayed(closure, [parameter.device for parameter in parameters])
        expected: Tensor | None = None
        totals: list[Tensor | None] = [None] * len(parameters)
        pattern, units = 0, -1
        with _no_mixing():
            while units < 0 or pattern < 2**units:
                outcomes = _Outcomes(pattern, self.limit)
                tape = Tape(outcomes)
                weighted = _weighted(tape, tape.run(run))
                found = tape.pull([weighted], [torch.ones_like(weighted)], parameters)
                totals = [add(total, part) for total, part in zip(totals, found)]
                expected = add(expected, weighted.detach())
                if units not in (-1, outcomes.count):
                    raise UnsupportedError("Enumeration: the number of units depends on their outcomes")
                pattern, units = pattern + 1, outcomes.count
        assert expected is not None
        return Estimate(expected, tuple(totals), pattern)


class _Outcomes:
    """One joint outcome: unit number i of every example is bit i of `pattern`."""

    def __init__(self, pattern: int, limit: int) -> None:
        self._pattern = pattern
        self._limit = limit
        self._first: list[int] = []
        self.count = 0

    def __call__(self, index: int, logits: Tensor, numbers: Tensor) -> Tensor:
        own = logits[0].numel() if logits.ndim and len(logits) else 1
        if index == len(self._first):
            self._first.append(self.count)
            self.count += own
        if self.count > self._limit:
            mend = "Raise Enumeration(limit=...), at twice the runs for each unit, or use ScoreFunction()."
            raise ArgumentError(
                "limit", self._limit, f"at least the number of units, {self.count} or more", mend
            )
        bits = [float(self._pattern >> (self._first[index] + i) & 1) for i in range(own)]
        row = torch.tensor(bits, dtype=logits.dtype, device=logits.device)
        return row.view(logits.shape[1:]).expand(logits.shape).clone()


def _weighted(tape: Tape, losses: Tensor) -> Tensor:
    """The mean over examples of this outcome's probability times its loss."""
    logs = [
        bernoulli_log_probability(outcome, logits).reshape(len(losses), -1).sum(1)
        for logits, outcome in zip(tape.logits, tape.outcomes)
    ]
    return (torch.stack(logs).sum(0).exp() * losses).mean()


@contextmanager
def _no_mixing() -> Iterator[None]:
    def refuse(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise UnsupportedError(
                f"Enumeration under {type(module).__name__} in training mode, which mixes examples: call its "
                ".eval(), or use LayerNorm or GroupNorm"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
