"""Energies at complex states: real parameters let in, what is not holomorphic found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from thalweg.errors import UnsupportedError


class _Promoted(TorchFunctionMode):
    """Casts real tensors that meet complex ones: matrix products and convolutions do not do so themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kinds = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        kind = next((kind for kind in kinds if kind.is_complex), None)
        name = getattr(func, "__name__", "")
        if name in ("grad", "backward"):
            # it must find the very tensors of the graph
            return func(*args, **kwargs)
        # an operator in place must go on writing into its own tensor
        if kind is not None and len(kinds) > 1 and not (name.endswith("_") and not name.endswith("__")):

            def cast(value: Any) -> Any:
                real = isinstance(value, Tensor) and value.is_floating_point()
                return value.to(kind) if real else value

            args, kwargs = tree_map(cast, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def complex_plane(active: bool) -> Iterator[None]:
    """Let a function written for real states run on complex ones; a plain body where not `active`.

    Raises:
        UnsupportedError: torch has no complex version of something in the body.
    """
    if not active:
        yield
        return
    try:
        with _Promoted():
            yield
    except (RuntimeError, TypeError) as error:
        if isinstance(error, UnsupportedError) or "complex" not in str(error).lower():
            raise
        raise UnsupportedError(
            f"holomorphic nudging: something has no complex version ({error}). Use holomorphic functions "
            "(scaled_sigmoid, smooth_clip, tanh, SoftMaxPool2d), or form='centered'"
        ) from error


def require_holomorphic(what: str, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
    """Check the Cauchy-Riemann equations at a point, by one forward and two backwards.

    Raises:
        UnsupportedError: they do not hold, or the value is real.
    """
    leaf = point.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
    good = value.is_complex() and value.requires_grad
    if good:
        one = torch.ones_like(value)
        (along,) = torch.autograd.grad(value, leaf, one, retain_graph=True)
        (across,) = torch.autograd.grad(value, leaf, 1j * one)
        # autograd multiplies by the conjugate derivative, and what is not holomorphic by more than that
        size = along.abs().max() + across.abs().max()
        gap = (across - 1j * along).abs().max()
        good = bool(gap <= torch.finfo(along.dtype).eps ** 0.5 * size)
    if not good:
        raise UnsupportedError(
            f"holomorphic nudging: {what} is not holomorphic (clip, relu, abs, max-pool and real parts are "
            "not). Use scaled_sigmoid, smooth_clip, tanh, SoftMaxPool2d, or form='centered'"
        )
