"""Activation and gradient at named modules, read without touching the computation.

Forward hooks capture the tensors and tensor hooks catch their gradients. Module backward hooks are never
used: they wrap the outputs of a module in views and so break in-place activations and residual `+=`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.errors import ArgumentError, ArgumentTypeError, require_choice

Transform = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Reading:
    """One tensor at one call of a module.

    Args:
        name: path of the module in the model.
        call: which call of the module within the probe, from 0.
        part: which floating-point tensor of a tuple, list or mapping, from 0.
        activation: its value when it passed, detached: a copy, or what `transform` made of it.
        gradient: the gradient that the last backward sent to this tensor as it was when it passed (before any
            in-place operation that followed), over all its uses; a copy, or what `transform` made of it; None
            when none arrived.
        differentiable: whether the tensor was part of a graph, so that a gradient could arrive at all.
    """

    name: str
    call: int
    part: int
    activation: Tensor
    gradient: Tensor | None = None
    differentiable: bool = False


class Probe:
    """What `probe` yields: the readings so far, by name of the module."""

    def __init__(self, names: tuple[str, ...], transform: Transform) -> None:
        self.names = names
        self._transform = transform
        self._calls: dict[str, list[list[Reading]]] = {name: [] for name in names}
        self._edges: list[torch.autograd.graph.GradientEdge] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __getitem__(self, name: str) -> Reading:
        """The reading of a module that ran once; its first tensor.

        Raises:
            ArgumentError: a module that was not named, did not run, ran more than once (use `reading`), or
                has no floating-point tensor there.
        """
        calls = self._named(name)
        if len(calls) > 1:
            mend = f"Take one with reading({name!r}, call=0), or all with calls({name!r})."
            raise ArgumentError("name", name, f"a module that ran once; it ran {len(calls)} times", mend)
        return self.reading(name)

    def reading(self, name: str, call: int = 0, part: int = 0) -> Reading:
        """The reading of one call and one tensor of a module.

        Raises:
            ArgumentError: no such module, call or part.
        """
        calls = self._named(name)
        if not -len(calls) <= call < len(calls):
            raise ArgumentError("call", call, f"one of the {len(calls)} calls of {name!r}")
        if not -len(calls[call]) <= part < len(calls[call]):
            expected = f"one of the {len(calls[call])} floating-point tensors of {name!r}"
            raise ArgumentError("part", part, expected)
        return calls[call][part]

    def calls(self, name: str) -> tuple[tuple[Reading, ...], ...]:
        """All readings of a module, `[call][part]`, in the order in which it ran."""
        return tuple(tuple(parts) for parts in self._named(name))

    def __iter__(self) -> Iterator[Reading]:
        """Every reading, module by module in the order in which they were named."""
        for name in self.names:
            for parts in self._calls[name]:
                yield from parts

    def differentiate(self, output: Tensor, *, retain_graph: bool = False) -> None:
        """Send the gradient of a scalar to all captured tensors, leaving every `.grad` as it is.

        Args:
            output: a scalar of the graph that ran inside the probe, for example a loss or a logit's sum.
            retain_graph: keep the graph for another call, as in `torch.autograd.grad`.

        Raises:
            ArgumentTypeError, ArgumentError: not a differentiable scalar, or no captured tensor has a graph.
        """
        if not isinstance(output, Tensor):
            raise ArgumentTypeError("output", output, "a scalar tensor")
        if output.numel() != 1 or not output.requires_grad:
            raise ArgumentError("output", output, "a scalar that requires grad")
        if not self._edges:
            mend = "Run the model inside the probe, with gradients enabled and something that requires grad."
            raise ArgumentError("output", output, "a probe that captured a differentiable tensor", mend)
        for reading in self:
            reading.gradient = None
        # the tensor hooks do the reading: they see each gradient on its way into the captured edge
        torch.autograd.grad(output, self._edges, retain_graph=retain_graph, allow_unused=True)

    def clear(self) -> None:
        """Forget all readings and the graphs they hold; call it between the batches of a long probe."""
        self._edges.clear()
        for calls in self._calls.values():
            calls.clear()

    def _named(self, name: str) -> list[list[Reading]]:
        if name not in self._calls:
            raise ArgumentError("name", name, f"one of the probed modules {self.names}")
        if not self._calls[name]:
            mend = "Run the model inside the probe."
            raise ArgumentError("name", name, "a module that ran", mend)
        return self._calls[name]

    def _capture(self, name: str, value: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            # checkpointing runs the forward again during backward: the same call, already captured
            return
        call = len(self._calls[name])
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and _has_gradient(leaf)]
        readings = [self._take(name, call, part, tensor) for part, tensor in enumerate(tensors)]
        self._calls[name].append(readings)

    def _take(self, name: str, call: int, part: int, tensor: Tensor) -> Reading:
        with torch.no_grad():
            activation = self._transform(tensor.detach())
        reading = Reading(name, call, part, activation, None, tensor.requires_grad)
        if tensor.requires_grad:

            def arrive(gradient: Tensor | None) -> None:
                # autograd passes None for an output of a fused kernel that the loss does not use
                if gradient is not None:
                    with torch.no_grad():
                        reading.gradient = self._transform(gradient.detach())

            self._edges.append(torch.autograd.graph.get_gradient_edge(tensor))
            self._handles.append(tensor.register_hook(arrive))
        return reading


@contextmanager
def probe(
    model: nn.Module,
    names: Iterable[str],
    *,
    side: str = "output",
    transform: Transform | None = None,
) -> Iterator[Probe]:
    """Read activation and gradient at named modules; the instrument for saliency, gains and taps.

    Inside the context run the model and then either `found.differentiate(scalar)`, which leaves every `.grad`
    alone, or your own `loss.backward()`. Readings stay readable after the context; the hooks are gone.
    Works beside in-place activations, residual `+=`, modules that run several times, tuple and mapping
    outputs, and non-reentrant checkpointing. Under reentrant checkpointing no gradient arrives.

    Args:
        model: the module whose submodules are named.
        names: paths as in `model.named_modules()`; "" is the model itself.
        side: "output" or "input" of the named modules.
        transform: applied at once to each activation and gradient, detached, without gradients; for example
            `torch.linalg.vector_norm`, which keeps no copy. None keeps copies.

    Yields:
        A `Probe`: `found["layer1"].activation`, `found["layer1"].gradient`.

    Raises:
        ArgumentError: an unknown name (the nearest are listed) or side.
        ArgumentTypeError: not a module, or names that are not strings.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
        >>> with probe(model, ["0", "1"]) as found:
        ...     found.differentiate(model(torch.ones(2, 3)).sum())
        >>> found["0"].gradient.shape, model[0].weight.grad is None
        (torch.Size([2, 4]), True)
    """
    require_choice("side", side, ("output", "input"))
    modules = _find(model, names)
    found = Probe(tuple(modules), torch.clone if transform is None else transform)
    try:
        for name, module in modules.items():
            found._handles.append(_watch(found, name, module, side))
        yield found
    finally:
        for handle in found._handles:
            handle.remove()
        found._handles.clear()
        found._edges.clear()


def _watch(found: Probe, name: str, module: nn.Module, side: str) -> torch.utils.hooks.RemovableHandle:
    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found._capture(name, (args, kwargs))

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found._capture(name, output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _find(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", model, "a torch.nn.Module")
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ArgumentTypeError("names", names, "an iterable of module paths", "Write [name] for one module.")
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in names:
        if not isinstance(name, str):
            raise ArgumentTypeError("names", name, "module paths as strings", "See model.named_modules().")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[1:4]
            mend = f"Nearest: {', '.join(map(repr, near))}." if near else "The model has no submodules."
            raise ArgumentError("names", name, "the path of a module of the model", mend)
        found[name] = known[name]
    if not found:
        raise ArgumentError("names", "none", "at least one module path")
    return found


def _has_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
