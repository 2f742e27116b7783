"""Parameters borrowed for a while: run a body under other weights, or without a trace, and give all back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from thalweg.errors import ArgumentError, require_choice

Change = Callable[[int, Tensor], Tensor]
Place = Callable[[int, Tensor, Tensor | None], Tensor]


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
    counted = tuple(b for _, _, b in buffers if not b.is_inference())
    gradients = [(p, p.grad) for p in leaves.values()]
    flags = [(module, module.training) for module in modules]
    devices = sorted({p.device.index or 0 for p in leaves.values() if p.is_cuda})
    # what comes back has the same bits: a graph that the user made before stays valid
    with torch.random.fork_rng(devices=devices), _unsafe_preserve_version_counter(counted):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for (module, name, buffer), value in zip(buffers, values):
                module._buffers[name] = buffer
                with torch.inference_mode(buffer.is_inference()):
                    unexpanded(buffer.detach()).copy_(value)
            for module, training in flags:
                module.training = training
