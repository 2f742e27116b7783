"""Parameters as a vector, and given their gradients the way autograd would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thalweg.borrowed import Place as Place
from thalweg.borrowed import borrowed as borrowed
from thalweg.borrowed import isolated as isolated
from thalweg.borrowed import loan as loan
from thalweg.borrowed import unexpanded as unexpanded
from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError


def collect(parameters: Iterable[Tensor], argument: str = "parameters") -> tuple[Tensor, ...]:
    """Check a list of parameters and fix its order; each tensor once.

    Args:
        parameters: leaf tensors, real floating point, requiring grad; an iterable such as
            `model.parameters()`. A tensor that comes twice (a tied weight) is kept once.
        argument: the name used in the error messages.

    Raises:
        ArgumentTypeError, ArgumentError: not an iterable of tensors, empty, or a tensor that cannot get a
            gradient.

    Example:
        >>> [tuple(p.shape) for p in collect(nn.Linear(2, 3).parameters())]
        [(3, 2), (3,)]
    """
    if isinstance(parameters, nn.Module | Tensor | str) or not isinstance(parameters, Iterable):
        raise ArgumentTypeError(
            argument, type(parameters), "an iterable of parameters", "Pass model.parameters()."
        )
    found: dict[int, Tensor] = {}
    for index, parameter in enumerate(parameters):
        name = f"{argument}[{index}]"
        if not isinstance(parameter, Tensor):
            mend = "Pass model.parameters(), not named_parameters()." if isinstance(parameter, tuple) else ""
            raise ArgumentTypeError(name, parameter, "a tensor", mend)
        if not parameter.is_floating_point():
            raise ArgumentTypeError(name, parameter, "a real floating-point tensor")
        if not (parameter.is_leaf and parameter.requires_grad):
            mend = "Filter with `p for p in model.parameters() if p.requires_grad`."
            raise ArgumentError(name, parameter, "a leaf tensor that requires grad", mend)
        found.setdefault(id(parameter), parameter)
    if not found:
        mend = "An iterator such as model.parameters() is used up after one pass: call it again."
        raise ArgumentError(argument, "none", "at least one parameter", mend)
    return tuple(found.values())


def vector(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors into one vector, in order.

    Raises:
        ArgumentTypeError, ArgumentError: not an iterable of tensors, or none at all.

    Example:
        >>> vector([torch.zeros(2, 2), torch.ones(1)])
        tensor([0., 0., 0., 0., 1.])
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise ArgumentTypeError("tensors", tensors, "an iterable of tensors")
    found = list(tensors)
    for index, tensor in enumerate(found):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"tensors[{index}]", tensor, "a tensor")
    if not found:
        raise ArgumentError("tensors", "none", "at least one tensor")
    return torch.cat([tensor.reshape(-1) for tensor in found])


def unvector(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cut a vector of shape (total,) back into tensors of the shapes and dtypes of `like`.

    Raises:
        ArgumentTypeError, ArgumentError: not a tensor, or its length is not the sum of the sizes.
    """
    if not isinstance(flat, Tensor):
        raise ArgumentTypeError("flat", flat, "a vector")
    total = sum(tensor.numel() for tensor in like)
    if flat.shape != (total,):
        raise ArgumentError("flat", flat, f"a vector of shape ({total},)")
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like))


def fill_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Hand each parameter its gradient through autograd, so that hooks fire and `.grad` accumulates.

    Args:
        parameters: leaf tensors that require grad.
        gradients: one tensor of the same shape per parameter, or None where there is none.

    Raises:
        ArgumentTypeError, ArgumentError: not tensors, or the numbers or the shapes differ.
        NonFiniteError: a gradient holds nan or infinity in the dtype of its parameter; nothing was filled.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> fill_gradients([weight], [torch.ones(2)]); fill_gradients([weight], [torch.ones(2)])
        >>> weight.grad
        tensor([2., 2.])
    """
    if len(parameters) != len(gradients):
        raise ArgumentError("gradients", f"{len(gradients)} of them", f"{len(parameters)}, one per parameter")
    for index, (parameter, gradient) in enumerate(zip(parameters, gradients)):
        if gradient is not None and not isinstance(gradient, Tensor):
            raise ArgumentTypeError(f"gradients[{index}]", gradient, "a tensor or None")
        if gradient is not None and gradient.shape != parameter.shape:
            raise ArgumentError(f"gradients[{index}]", gradient, f"shape {tuple(parameter.shape)}")
    # a copy: `.grad` takes over what it is handed, and the next accumulation would write into it
    copies = [None if g is None else g.detach().to(p.dtype, copy=True) for p, g in zip(parameters, gradients)]
    require_finite_all("gradients", copies)
    hand_over(parameters, copies)


def hand_over(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Like `fill_gradients`, without a check and without a copy: `.grad` takes over what it is handed."""
    pairs = [(p, g) for p, g in zip(parameters, gradients) if g is not None]
    if pairs:
        # a fresh view per parameter: the gradient then enters through the same node that backward uses
        with torch.enable_grad():
            views = [p.view_as(p) for p, _ in pairs]
        torch.autograd.backward(views, [g for _, g in pairs])


def require_finite_all(what: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise `NonFiniteError` naming the first tensor that is not finite; one synchronisation for all.

    None and tensors without data (fake, meta) pass.
    """
    real = [
        (index, t.detach())
        for index, t in enumerate(tensors)
        if not (t is None or isinstance(t, FakeTensor) or t.is_meta)
    ]
    if not real:
        return
    device = real[0][1].device
    # an embedding with sparse=True has a gradient whose values are looked at by themselves
    values = [t.coalesce().values() if t.is_sparse else t for _, t in real]
    finite = torch.stack([torch.isfinite(value).all().to(device) for value in values])
    if not bool(finite.all()):
        raise NonFiniteError(f"{what}[{real[int(finite.long().argmin())][0]}] holds nan or infinity")


def all_reduce_gradients_(parameters: Iterable[Tensor], group: Any | None = None) -> None:
    """Average `.grad` over the processes of `torch.distributed`, in place; call it after `thalweg.backward`.

    The way to train on several processes with a rule that a DistributedDataParallel wrapper cannot serve:
    keep the bare module on each rank, fill `.grad`, call this, step the optimizer.

    Args:
        parameters: the same parameters in the same order on every rank; those without `.grad` count as zero.
        group: a process group, or None for the default one.

    Raises:
        UnsupportedError: torch.distributed is not initialised.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError("all_reduce_gradients_: call torch.distributed.init_process_group first")
    found = collect(parameters)
    world = dist.get_world_size(group)
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(world)
