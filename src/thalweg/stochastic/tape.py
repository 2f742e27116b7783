"""The tape on which random units leave their logits and outcomes while an estimator runs the closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from thalweg.errors import ArgumentError, UnsupportedError
from thalweg.step import Closure, losses_per_example

Force = Callable[[Tensor], Tensor]


class Tape:
    """What the units with `gradient=None` did in one run of a closure, in the order in which they ran.

    Args:
        force: None lets the units draw; else `force(logits)` returns their outcomes, of the logits' shape.

    Attributes:
        logits: the logits of each unit, attached to the graph.
        outcomes: its outcomes, zeros and ones, without gradient.
    """

    def __init__(self, force: Force | None = None) -> None:
        self.force = force
        self.logits: list[Tensor] = []
        self.outcomes: list[Tensor] = []
        self._closed = False

    def record(self, logits: Tensor, outcome: Tensor) -> None:
        """Note one unit; refused where its logits carry no graph that they should carry."""
        if self._closed:
            # a checkpoint runs its units again during the backward
            return
        if not torch.is_grad_enabled():
            raise UnsupportedError(
                "a unit with gradient=None ran under torch.no_grad(), where its score has no graph; for "
                "torch.utils.checkpoint pass use_reentrant=False"
            )
        self.logits.append(logits)
        self.outcomes.append(outcome)

    def run(self, closure: Closure) -> Tensor:
        """Run the closure with this tape and close it; the losses per example, shape (batch,).

        Raises:
            ArgumentError: the loss is a scalar, no unit with `gradient=None` ran in training mode, or the
                first dimension of a unit's logits is not the batch.
        """
        with torch.enable_grad():
            losses = losses_per_example(closure())
        self._closed = True
        if losses.ndim != 1:
            mend = "Leave out the mean: cross_entropy(model(x), y, reduction='none')."
            raise ArgumentError("closure", losses, "one loss per example, shape (batch,)", mend)
        if not self.logits:
            mend = "Make it BinaryNeuron(gradient=None) and call model.train()."
            raise ArgumentError(
                "closure", "none", "at least one unit with gradient=None in training mode", mend
            )
        for index, logits in enumerate(self.logits):
            if logits.ndim == 0 or len(logits) != len(losses):
                expected = f"logits of shape ({len(losses)}, ...), one row per loss"
                raise ArgumentError(f"closure: random unit {index}", logits, expected)
        return losses


_current: ContextVar[Tape | None] = ContextVar("thalweg_tape", default=None)


def current() -> Tape | None:
    """The tape of the estimator that runs now, or None."""
    # while an estimator runs nothing is compiled, and the compiler cannot read a context variable
    return None if torch.compiler.is_compiling() else _current.get()


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Let the units that run in the body write on `tape`; compiled modules run as they were written."""
    token = _current.set(tape)
    try:
        # a compiled region would not see the tape
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _current.reset(token)
