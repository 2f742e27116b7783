"""The state of an equilibrium: its parts, its examples, and how far one step moved it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from thalweg.errors import ArgumentError, ArgumentTypeError

State = tuple[Tensor, ...]


def taken_apart(argument: str, value: Any) -> tuple[State, Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a state, and the function that puts them together again.

    Raises:
        ArgumentTypeError, ArgumentError: something in it is no floating-point tensor, or it is empty.
    """
    leaves, structure = tree_flatten(value)
    for index, leaf in enumerate(leaves):
        name = argument if len(leaves) == 1 else f"{argument}[{index}]"
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            raise ArgumentTypeError(name, leaf, "a floating-point tensor, or such tensors in a tuple or list")
        if leaf.numel() == 0:
            raise ArgumentError(name, leaf, "at least one element")
    if not leaves:
        raise ArgumentTypeError(argument, value, "a floating-point tensor, or such tensors in a tuple")
    return tuple(leaves), lambda parts: tree_unflatten(list(parts), structure)


def require_same(
    argument: str, found: Any, like: State, together: Callable[[Sequence[Tensor]], Any]
) -> State:
    """The tensors of what a function returned, which must be a state like the one it was given."""
    leaves, structure = tree_flatten(found)
    wanted = tree_flatten(together(like))[1]
    if structure != wanted or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ArgumentTypeError(argument, found, "a function that returns a state like its argument")
    for index, (leaf, part) in enumerate(zip(leaves, like)):
        if leaf.shape != part.shape or leaf.dtype != part.dtype:
            name = f"{argument}: its result" if len(like) == 1 else f"{argument}: part {index} of its result"
            mend = "Autocast changes the dtype: cast the result back with .to(z.dtype)."
            expected = f"shape {tuple(part.shape)} and {part.dtype}"
            raise ArgumentError(name, leaf, expected, mend if leaf.shape == part.shape else "")
    return tuple(leaves)


def examples(state: State) -> int:
    """How many examples a state holds: the first dimension, where each part has another beside it; else 1."""
    sizes = {part.shape[0] if part.ndim >= 2 else None for part in state}
    size = sizes.pop()
    return 1 if sizes or size is None else size


def joined(state: State) -> Tensor:
    """All parts as one matrix of shape (examples, values), in single precision at least."""
    count = examples(state)
    rows = [part.reshape(count, -1) for part in state]
    return torch.cat([r.float() if r.dtype in (torch.float16, torch.bfloat16) else r for r in rows], 1)


def parted(rows: Tensor, like: State) -> State:
    """The inverse of `joined`."""
    widths = [part.numel() // len(rows) for part in like]
    return tuple(r.reshape(p.shape).to(p.dtype) for r, p in zip(rows.split(widths, 1), like))


def norms(state: State) -> Tensor:
    """The Euclidean norm of each example, shape (examples,)."""
    count = examples(state)
    lengths: list[Tensor] = [
        torch.linalg.vector_norm(_wide(part.reshape(count, -1)), dim=1) for part in state
    ]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(lengths), dim=0) if len(lengths) > 1 else lengths[0]
    return whole


def moved(old: State, new: State) -> Tensor:
    """How far each example moved, relative to one plus its norm; shape (examples,)."""
    away = tuple(b.detach() - a.detach() for a, b in zip(old, new))
    return norms(away) / (1 + norms(tuple(part.detach() for part in new)))


def per_example(values: Tensor, part: Tensor) -> Tensor:
    """One value per example, shaped so that it multiplies a part of the state."""
    if values.numel() == 1:
        return values.reshape(()).to(part.dtype)
    return values.to(part.dtype).reshape(-1, *[1] * (part.ndim - 1))


def without_data(state: State) -> bool:
    """Whether the tensors are fake, so that no value can be looked at."""
    return any(isinstance(part, FakeTensor) or part.is_meta for part in state)


def autocast_of(state: State) -> Callable[[], AbstractContextManager[Any]]:
    """Remember autocast: a backward that evaluates again must compute as the forward did."""
    kinds = {"cpu", state[0].device.type}
    known = {
        kind: torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    }

    def again() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for kind, dtype in known.items():
            if dtype is not None or torch.is_autocast_enabled(kind):
                stack.enter_context(
                    torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
                )
        return stack

    return again


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
