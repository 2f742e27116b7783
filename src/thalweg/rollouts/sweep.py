"""One node in the graph for a whole process, whose backward is a sweep of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import UnsupportedError

State = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """What a process leaves behind for its backward.

    Args:
        name: the policy, for messages.
        outputs: the results, computed without a graph.
        kept: the tensors that the backward needs besides the inputs.
        run: `run(inputs, kept, cotangents)` returns one gradient, or None, per input.
    """

    name: str
    outputs: State
    kept: State
    run: Callable[[State, State, State], Gradients]


def attach(sweep: Sweep, inputs: State) -> State:
    """Join the outputs of a process to its inputs in the graph.

    Args:
        sweep: the outputs, and how to go back.
        inputs: the initial state and every captured tensor; what requires no grad gets none.

    Returns:
        The outputs; differentiable once. A second derivative is refused with `UnsupportedError`.
    """
    results: State = _Process.apply(sweep, *inputs)  # type: ignore[no-untyped-call]
    return results


class _Process(torch.autograd.Function):
    @staticmethod
    def forward(sweep: Sweep, *inputs: Tensor) -> State:
        return sweep.outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
        sweep, *tensors = inputs
        ctx.save_for_backward(*tensors, *sweep.kept)
        ctx.count = len(tensors)
        ctx.run, ctx.name = sweep.run, sweep.name

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        with torch.no_grad():
            gradients = ctx.run(inputs, kept, tuple(c.detach() for c in cotangents))
        if torch.is_grad_enabled():
            # a graph of the backward was asked for: on whatever it depends on, it now refuses
            gradients = _Once.apply(ctx.name, len(gradients), *gradients, *inputs, *cotangents)  # type: ignore[no-untyped-call]
        return None, *gradients


class _Once(torch.autograd.Function):
    """The identity on the gradients, whose own derivative by anything behind them is refused."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise UnsupportedError(
            f"{ctx.name}: no second derivative, the backward sweep leaves no graph. Use Backprop() or "
            "Checkpointed(), which are differentiable any number of times"
        )
