"""A field as a plain function of state and time, for what differentiates or integrates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thalweg.errors import ArgumentError, ArgumentTypeError, require_floating
from thalweg.flows.field import Field, batched_times
from thalweg.flows.prediction import Kind, require_kind

VectorField = Callable[[Tensor, Tensor], Tensor]
"""A function of x, (batch, ...), and times, (batch,), whose result is shaped as x."""


def vector_field(
    field: Field | VectorField,
    kind: Kind | None = None,
    conditions: Mapping[str, Any] | None = None,
    argument: str = "field",
) -> VectorField:
    """The prediction of a field as a function of x and t; a bare function stays what it is.

    Args:
        field: a field, or any function of x, (batch, ...), and t, (batch,).
        kind: which prediction; None for the score. Only None for a bare function.
        conditions: handed to the network.
        argument: what the field is called in a refusal.

    Raises:
        ArgumentError: batch normalisation in training mode, under which examples are not independent of each
            other; a kind for a bare function; a score of a coupled field.
        ArgumentTypeError: not a field and not a function.

    Example:
        >>> from thalweg.flows import Straight
        >>> field = Field(lambda x, t: -x, Straight(), predicts="noise")
        >>> vector_field(field)(torch.ones(1, 2), torch.tensor([0.5]))
        tensor([[2., 2.]])
    """
    given = dict(conditions or {})
    if isinstance(field, Field):
        require_uncoupled_examples(argument, field.network)
        wanted: Kind = "score" if kind is None else kind
        require_kind("kind", wanted)
        known: Field = field
        known._refuse_score("kind", wanted)

        def predicted(x: Tensor, t: Tensor) -> Tensor:
            return known.predict(wanted, x, t, **given)

        return predicted
    if not callable(field) or isinstance(field, type):
        raise ArgumentTypeError(argument, field, "a thalweg.flows.Field, or a function of x and t")
    if kind is not None:
        mend = "Make it a Field, which knows its path and what it predicts."
        raise ArgumentError("kind", kind, "None for a bare function", mend)
    require_uncoupled_examples(argument, field)
    function: Callable[..., Tensor] = field

    def called(x: Tensor, t: Tensor) -> Tensor:
        output = function(x, t, **given)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise ArgumentError(argument, output, f"a function whose result has the shape {tuple(x.shape)}")
        return output.to(x.dtype)

    return called


def state_and_times(x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """The states, checked and (batch, ...), and one time for each."""
    if require_floating("x", x).ndim < 2 or 0 in x.shape:
        raise ArgumentError("x", x, "a batch of states with features, shape (batch, ...)")
    return x, batched_times(x, t)


def per_example(values: Tensor) -> Tensor:
    """The sum over the features of each example, (batch,)."""
    return values.flatten(1).sum(1)


def scores(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a scalar function per example, (batch,), and their gradients, shaped as x."""
    found = torch.func.vjp(function, x)
    values, pull = found[0], found[1]
    return values, pull(torch.ones_like(values))[0]


def require_uncoupled_examples(argument: str, network: object) -> None:
    """Refuse batch statistics: the Jacobian of one example is not defined where others act on it."""
    if not isinstance(network, nn.Module):
        return
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            mend = "Call .eval() on the network first, or use a normalisation within examples."
            raise ArgumentError(argument, f"batch statistics in {name or 'the network'}", "examples that do "
                                "not act on each other", mend)  # fmt: skip


def require_independent_examples(argument: str, function: VectorField, x: Tensor, t: Tensor) -> None:
    """Refuse a function in which one example acts on another, by the derivative: one backward."""
    if len(x) < 2:
        return
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = function(leaf, t)
        if not output.requires_grad:
            return
        (pulled,) = torch.autograd.grad(output[0].sum(), leaf, allow_unused=True)
    if pulled is not None and bool((pulled[1:] != 0).any()):
        mend = "A Jacobian per example does not exist here: test the network without its coupling."
        raise ArgumentError(argument, "a network that mixes examples", "examples that do not act on each "
                            "other", mend)  # fmt: skip
