"""Go along directions and come back: what happens to the weights between two evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from thalweg.blackbox.directions import Bound
from thalweg.borrowed import _require_own_memory, loan

Go = Callable[[int, float], None]
Restore = Literal["copy", "swap", "inplace"]
RESTORES: tuple[str, ...] = get_args(Restore)


@contextmanager
def walk(parameters: Sequence[Tensor], bound: Bound, restore: Restore) -> Iterator[Go]:
    """Run a body that visits points along the directions, and give the parameters back afterwards.

    Args:
        parameters: leaf tensors, none overlapping another in memory.
        bound: the directions.
        restore: "copy" and "swap" as in `thalweg.parameters.borrowed`, bit for bit. "inplace" adds and
            subtracts again: no memory beyond one parameter's direction, but every return rounds.

    Returns:
        In the `with`, a function `go(sample, step)` that puts the parameters `step` along direction `sample`,
        from where they were before the walk.
    """
    if restore == "inplace":
        _require_own_memory(parameters)
        with _in_place(parameters, bound) as go:
            yield go
        return
    with loan(parameters, restore) as move:

        def go(sample: int, step: float) -> None:
            def moved(index: int, value: Tensor, out: Tensor | None) -> Tensor:
                drawn = bound.part(sample, index, value)
                if drawn is None:
                    return value
                # one rounding: the product is not rounded to a low precision before the sum
                return torch.add(value, drawn, alpha=step, out=drawn if out is None else out)

            move(moved)

        yield go


@contextmanager
def _in_place(parameters: Sequence[Tensor], bound: Bound) -> Iterator[Go]:
    here: list[tuple[int, float]] = []

    def shift(sample: int, step: float) -> None:
        for index, parameter in enumerate(parameters):
            value = parameter.detach()
            drawn = bound.part(sample, index, value)
            if drawn is not None:
                value.add_(drawn, alpha=step)
            del drawn
        torch.clear_autocast_cache()

    def go(sample: int, step: float) -> None:
        away = here.pop() if here else (sample, 0.0)
        if away[0] != sample:
            shift(away[0], -away[1])
            away = (sample, 0.0)
        shift(sample, step - away[1])
        here.append((sample, step))

    with _unsafe_preserve_version_counter(tuple(parameters)):
        try:
            yield go
        finally:
            if here:
                shift(here[0][0], -here[0][1])
