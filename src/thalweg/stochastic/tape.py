"""The tape on which random units leave their logits and outcomes while an estimator runs the closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thalweg import noise
from thalweg.errors import ArgumentError, UnsupportedError
from thalweg.losses import losses_per_example
from thalweg.step import Closure

Decide = Callable[[int, Tensor, Tensor], Tensor]


class Tape:
    """What the units with `gradient=None` did in one run of a closure, in the order in which they ran.

    Every unit draws one uniform number per entry whatever becomes of it, so that runs with the same random
    state see the same numbers at the same place, and a plain run the same bits as without a tape.

    Args:
        decide: None lets the units fire where their number lies below sigmoid(logits); else
            `decide(index, logits, numbers)` returns the outcomes of unit call `index`, of the logits' shape:
            zeros and ones, or relaxed values, which may carry a graph.
        salt: 0 for the numbers that the units draw without a tape; any other value for independent ones.
        graph: False for a run of which only the losses are wanted, which keeps no graph.

    Attributes:
        logits: the logits of each unit call, attached to the graph.
        outcomes: its outcomes.
        numbers: its uniform numbers, in float32 at least.
        keys: the keys from which they were drawn, before the salt.
    """

    def __init__(self, decide: Decide | None = None, *, salt: int = 0, graph: bool = True) -> None:
        self.logits: list[Tensor] = []
        self.outcomes: list[Tensor] = []
        self.numbers: list[Tensor] = []
        self.keys: list[Tensor] = []
        self._decide = decide
        self._salt = salt
        self._graph = graph
        self._index: dict[int, int] = {}
        self._closed = False

    def outcome(self, logits: Tensor) -> Tensor:
        """Decide for one unit and note it; refused where its logits carry no graph that they should carry."""
        key = noise.fresh_key(logits)
        numbers = uniform_numbers(logits, key ^ self._salt if self._salt else key)
        index = self._seen(key, logits) if self._closed else len(self.logits)
        if self._decide is None:
            outcome = fires(logits, numbers)
        else:
            outcome = self._decide(index, logits, numbers).to(logits.dtype)
            outcome = torch.where(logits.detach().isnan(), logits.detach(), outcome)
        if self._closed:
            # a checkpoint runs its units again during the backward
            return outcome
        if self._graph and not torch.is_grad_enabled():
            raise UnsupportedError(
                "a unit with gradient=None ran under torch.no_grad(), where its score has no graph; for "
                "torch.utils.checkpoint pass use_reentrant=False"
            )
        self.logits.append(logits)
        self.outcomes.append(outcome)
        self.numbers.append(numbers)
        self.keys.append(key)
        if not isinstance(key, FakeTensor):
            self._index[int(key)] = index
        return outcome

    def _seen(self, key: Tensor, logits: Tensor) -> int:
        """Which call runs again: checkpointing gives it the random state, and with it the key, of then."""
        if not isinstance(key, FakeTensor):
            return self._index.get(int(key), 0)
        # without data there are no keys, and nothing but the shape matters
        return next((i for i, seen in enumerate(self.logits) if seen.shape == logits.shape), 0)

    def run(self, closure: Closure) -> Tensor:
        """Run the closure with this tape and close it; the losses per example, shape (batch,).

        Raises:
            ArgumentError: the loss is a scalar, no unit with `gradient=None` ran in training mode, or the
                first dimension of a unit's logits is not the batch.
        """
        with recording(self), torch.set_grad_enabled(self._graph):
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

    def pull(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        inputs: Sequence[Tensor],
        *,
        create_graph: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """The sum of the cotangents' products with the Jacobians of what this run computed.

        Args:
            outputs: losses, logits or derivatives of this run; those without a graph are left out.
            cotangents: one per output, of its shape.
            inputs: what to differentiate with respect to.
            create_graph: whether the result is to be differentiated again, in this tape.

        Raises:
            ArgumentError: no output has a graph.
        """
        pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
        if not pairs:
            mend = "Neither the loss nor the logits of any unit require grad."
            raise ArgumentError("closure", outputs[0], "losses that depend on the parameters", mend)
        with recording(self), _without_hooks(inputs):
            return torch.autograd.grad(
                [output for output, _ in pairs],
                list(inputs),
                [cotangent for _, cotangent in pairs],
                allow_unused=True,
                create_graph=create_graph,
            )


def uniform_numbers(logits: Tensor, key: Tensor) -> Tensor:
    """The uniform numbers by which units decide, one per logit, in float32 at least."""
    # rounding to 8 bits would move every probability, and those near 1 to 1
    precise = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return noise.uniform(precise, key)


def fires(logits: Tensor, numbers: Tensor) -> Tensor:
    """One where the number lies below sigmoid(logits), else zero; nan where the logit is nan."""
    logits = logits.detach()
    hard = (numbers < torch.sigmoid(logits.to(numbers.dtype))).to(logits.dtype)
    return torch.where(logits.isnan(), logits, hard)


def per_example(signal: Tensor, like: Tensor) -> Tensor:
    """Shape one value per example, (batch,), so that it multiplies a tensor of shape (batch, ...)."""
    return signal.view(-1, *[1] * (like.ndim - 1))


def precise(losses: Tensor) -> Tensor:
    """Losses without graph, in float32 at least: their differences are what teaches the units."""
    return losses.detach().to(torch.promote_types(losses.dtype, torch.float32))


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Keep the leaves' own hooks quiet: they fire when `.grad` is filled, and once is enough."""
    # emptied in place, since autograd holds on to the dictionary itself
    kept = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, items in kept:
            hooks.update(items)


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
