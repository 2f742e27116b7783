"""Parameters as a vector, borrowed for a while, and given their gradients the way autograd would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from thalweg.errors import ArgumentError, ArgumentTypeError, NonFiniteError, UnsupportedError, require_choice

Change = Callable[[int, Tensor], Tensor]
Place = Callable[[int, Tensor, Tensor | None], Tensor]


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
    pairs = [(p, g) for p, g in zip(parameters, copies) if g is not None]
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


@contextmanager
def borrowed(parameters: Sequence[Tensor], change: Change, restore: str = "copy") -> Iterator[None]:
    """Run a body under changed parameters and give them back bit for bit, also after an exception.

    Args:
        parameters: leaf tensors, none overlapping another in memory.
        change: `change(index, value)` returns the value to use instead of `parameters[index]`; a pure
            function (draw from a key), for "swap" calls it at every use.
        restore: "copy" changes all parameters at once and keeps a copy: one extra model of memory, any code
            in the body. "swap" changes each parameter only while the module that owns it runs: extra memory
            of the largest module. Outside its module a swapped parameter reads as nan, so a body that uses
            one there (`nn.MultiheadAttention` reads its projection's weight) cannot go wrong silently.

    Raises:
        ArgumentError: an unknown `restore`, or parameters that overlap in memory.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> with torch.no_grad(), borrowed([layer.weight], lambda i, value: value + 1.0):
        ...     inside = layer.weight.item()
        >>> inside == before + 1.0, layer.weight.item() == before
        (True, True)
    """
    with loan(parameters, restore) as move:
        move(lambda index, value, _: change(index, value))
        yield


@contextmanager
def loan(parameters: Sequence[Tensor], restore: str = "copy") -> Iterator[Callable[[Place], None]]:
    """Like `borrowed`, for a body that goes to several places: one copy and one return for all of them.

    Args:
        parameters: as in `borrowed`.
        restore: as in `borrowed`.

    Returns:
        In the `with`, a function `move(place)`: puts `place(index, value, out)` in place of each parameter,
        where `value` is always the one from before the loan. What `place` writes into `out` and returns
        spares a copy; for "swap" there is nothing to write into and `out` is None.

    Raises:
        ArgumentError: as in `borrowed`.

    Example:
        >>> weight = torch.ones(1)
        >>> with loan([weight]) as move:
        ...     for step in (0.25, -0.25):
        ...         move(lambda index, value, out: torch.add(value, step, out=out))
        ...         print(weight.item())
        1.25
        0.75
        >>> weight.item()
        1.0
    """
    require_choice("restore", restore, ("copy", "swap"))
    _require_own_memory(parameters)
    body = _copied(parameters) if restore == "copy" else _swapped(parameters)
    with body as move_to:

        def move(place: Place) -> None:
            move_to(place)
            # autocast keeps its casts of the weights by the tensor, not by what it holds
            torch.clear_autocast_cache()

        try:
            yield move
        finally:
            torch.clear_autocast_cache()


def _require_own_memory(parameters: Sequence[Tensor]) -> None:
    spans = []
    for index, parameter in enumerate(parameters):
        if unexpanded(parameter).shape != parameter.shape:
            mend = "Give it memory of its own with .clone()."
            raise ArgumentError(f"parameters[{index}]", parameter, "no expanded dimension", mend)
        if parameter.numel():
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride()))
            start, width = parameter.storage_offset(), parameter.element_size()
            storage = parameter.untyped_storage()._cdata
            spans.append((storage, start * width, (start + last + 1) * width, index))
    spans.sort()
    # parts of one block that do not overlap are fine: so cuDNN keeps the weights of an LSTM
    for (storage, _, end, one), (next_storage, start, _, other) in pairwise(spans):
        if storage == next_storage and start < end:
            mend = "Tie weights by using the same Parameter object twice."
            first, second = sorted((one, other))
            name = f"parameters[{second}]"
            raise ArgumentError(name, parameters[second], f"memory not shared with [{first}]", mend)


def unexpanded(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that holds each of its values once; a view, which may be written to.

    Example:
        >>> unexpanded(torch.ones(2, 1).expand(2, 3)).shape
        torch.Size([2, 1])
    """
    repeated = [size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride())]
    return tensor[tuple(slice(1) if each else slice(None) for each in repeated)] if any(repeated) else tensor


@contextmanager
def _copied(parameters: Sequence[Tensor]) -> Iterator[Callable[[Place], None]]:
    kept: list[Tensor] = []

    def move(place: Place) -> None:
        for index, parameter in enumerate(parameters):
            value = parameter.detach()
            if index == len(kept):
                kept.append(value.clone())
            moved = place(index, kept[index], value)
            if moved is not value:
                value.copy_(moved)

    # what comes back has the same bits: a graph that the user made before stays valid
    with _unsafe_preserve_version_counter(tuple(parameters)):
        try:
            yield move
        finally:
            for parameter, value in zip(parameters, kept):
                parameter.detach().copy_(value)


@contextmanager
def _swapped(parameters: Sequence[Tensor]) -> Iterator[Callable[[Place], None]]:
    index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
    kept = [parameter.data for parameter in parameters]
    depth = [0] * len(parameters)
    places: list[Place] = []

    def move(place: Place) -> None:
        places[:] = [place]
        for parameter, value in zip(parameters, kept):
            parameter.data = _unreadable(value)

    def enter(module: nn.Module, _inputs: object) -> None:
        for index in owned(module):
            depth[index] += 1
            if depth[index] == 1:
                parameters[index].data = places[0](index, kept[index], None)

    def leave(module: nn.Module, _inputs: object, _output: object) -> None:
        for index in owned(module):
            depth[index] -= 1
            if depth[index] == 0:
                parameters[index].data = _unreadable(kept[index])

    def owned(module: nn.Module) -> list[int]:
        return [index_of[id(p)] for p in module._parameters.values() if places and id(p) in index_of]

    handles = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield move
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in zip(parameters, kept):
            parameter.data = value


def _unreadable(value: Tensor) -> Tensor:
    return torch.full((), float("nan"), dtype=value.dtype, device=value.device).expand(value.shape)


@contextmanager
def isolated(model: nn.Module | None, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Run a body and leave no trace: buffers, `.grad`, training flags and random states come back.

    What only reads gradients runs inside this. Inside, `.grad` is None everywhere. Buffers are copied;
    parameters are not, so a body that writes into them must give them back itself (see `borrowed`).

    Args:
        model: the module whose buffers, flags and parameters are kept, or None.
        parameters: further leaf tensors whose `.grad` is kept.
    """
    leaves = {id(p): p for p in parameters}
    modules = list(model.modules()) if model is not None else []
    if model is not None:
        leaves.update((id(p), p) for p in model.parameters())
    buffers = [
        (module, name, b) for module in modules for name, b in module._buffers.items() if b is not None
    ]
    values = [unexpanded(b.detach()).clone() for _, _, b in buffers]
    gradients = [(p, p.grad) for p in leaves.values()]
    flags = [(module, module.training) for module in modules]
    devices = sorted({p.device.index or 0 for p in leaves.values() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for (module, name, buffer), value in zip(buffers, values):
                module._buffers[name] = buffer
                unexpanded(buffer.detach()).copy_(value)
            for module, training in flags:
                module.training = training
