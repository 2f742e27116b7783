"""What a step closes over: the modules, generators and other things that recomputation could disturb."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import UnsupportedError

_MOST = 10_000  # objects looked at; a step that reaches more holds a data set, not a model


def reached(*roots: object) -> list[Any]:
    """The objects that functions, methods, partials, containers and plain objects lead to.

    Looks into closures, defaults, the globals a function names, attributes and containers; a module is
    returned and not entered.
    """
    found: list[Any] = []
    seen: set[int] = set()
    queue: list[object] = list(roots)
    while queue and len(seen) < _MOST:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type | types.ModuleType | str | bytes | int | float):
            continue
        seen.add(id(thing))
        found.append(thing)
        if not isinstance(thing, nn.Module | Tensor | torch.Generator):
            queue.extend(_inside(thing))
    return found


def _inside(thing: Any) -> Iterator[object]:
    if isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                continue
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        yield from _globals(thing)
        yield from _wrapped(thing)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif not type(thing).__module__.startswith(("torch", "builtins", "numpy")):
        yield from vars(thing).values() if hasattr(thing, "__dict__") else ()
        call = getattr(type(thing), "__call__", None)  # noqa: B004 - not whether, but which
        if isinstance(call, types.FunctionType):
            yield call


def _globals(function: types.FunctionType) -> Iterator[object]:
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        for name in code.co_names:
            value = function.__globals__.get(name)
            if value is not None and not getattr(value, "__module__", "").startswith(("torch.", "numpy.")):
                yield value


def _wrapped(function: types.FunctionType) -> Iterator[object]:
    if hasattr(function, "__wrapped__"):
        yield function.__wrapped__


class Guard:
    """Watches the first forward of a process for things that a recomputation would not repeat.

    Args:
        roots: the step, the read-out, the network and the inputs.
    """

    def __init__(self, *roots: object) -> None:
        things = reached(*roots)
        modules = {id(m): m for t in things if isinstance(t, nn.Module) for m in t.modules()}
        self.modules = tuple(modules.values())
        self.generators = tuple(t for t in things if isinstance(t, torch.Generator))
        # nothing that a module of this kind computes in training depends on its running statistics
        self.normalisations = tuple(m for m in self.modules if _keeps_statistics(m))
        known = {id(m) for m in self.normalisations}
        self._buffers = [
            (m, name, buffer, buffer._version)
            for m in self.modules
            if id(m) not in known
            for name, buffer in m._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        self.checked = False
        self._drawn = [_state(generator) for generator in self.generators]
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def check(self) -> None:
        """Raise `UnsupportedError` when the forward drew or wrote what cannot be repeated."""
        self.checked = True
        for generator, before in zip(self.generators, self._drawn):
            if _state(generator) != before:
                raise UnsupportedError(
                    "Checkpointed: the step draws from a torch.Generator, which recomputation does not "
                    "rewind: the gradient would be wrong. Draw with thalweg.noise.normal(like, key) from "
                    "rollout(..., key=...), or from torch's default generator"
                )
        if random.getstate() != self._python or _numpy_state() != self._numpy:
            raise UnsupportedError(
                "Checkpointed: the step draws from Python's random or from NumPy, which recomputation does "
                "not rewind: the gradient would be wrong. Draw with torch, or from rollout(..., key=...)"
            )
        for module, name, buffer, version in self._buffers:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                raise UnsupportedError(
                    f"Checkpointed: {type(module).__name__} changes its buffer {name!r} in the step, and "
                    "recomputation would see another value and change it again. Put the module into eval "
                    "mode, or store everything with Backprop()"
                )


def _keeps_statistics(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
    )


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


def _numpy_state() -> object:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    state = numpy.random.get_state()
    return (state[0], state[1].tobytes(), *state[2:])


def signature(process: Any, leaves: tuple[Any, ...]) -> Any:
    """What a process's cost depends on, as a hashable value: code, shapes, flags and small settings."""
    things = reached(process.step, process.network, process.then, process.inputs)
    described: list[Any] = [_described(thing) for thing in (*leaves, *things)]
    settings = (process.steps, process.first, process.shares, process.cotangent, process.trajectory)
    precision = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return (str(process.structure), settings, *precision, *described)


def _described(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return (tuple(thing.shape), thing.dtype, str(thing.device), thing.requires_grad)
    if isinstance(thing, nn.Module):
        flags = tuple((type(m), m.training) for m in thing.modules())
        return (id(thing), flags, tuple(_described(p) for p in thing.parameters()))
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return (thing.__code__, tuple(c for c in cells if isinstance(c, bool | int | str)))
    return type(thing)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading an empty cell raises
    except ValueError:
        return False
    return True
