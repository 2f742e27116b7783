"""One instrumented forward: who called whom, which operation made which node, where a tensor left the graph.

Modules are watched by forward hooks and tensor hooks only (module backward hooks break in-place activations
and residual `+=`), operations by a function mode. A tensor made from one that required grad, and that does
not require grad itself, is a *cut*; cuts are followed forward, so that only those the loss depends on count.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from thalweg.doctor.graph import Node, edges, is_leaf, tensors_in
from thalweg.doctor.readings import Readings
from thalweg.ledger.storages import written_name

OUTSIDE = "(outside)"
_LIBRARY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep)
_LEAVES_TORCH = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__"})
# results that carry nothing of the values that went in
_VALUE_FREE = frozenset(
    {"requires_grad_", "retain_grad", "register_hook", "_is_all_true", "_set_grad_enabled"}
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node of the graph was made: module path, operation, and line of the user's code."""

    path: str
    operation: str
    line: str


@dataclass(slots=True, eq=False)
class Call:
    """One call of a module: its main output (the first floating tensor) and the readings taken there."""

    path: str
    kind: str
    parent: Call | None
    parametric: bool
    shape: tuple[int, ...] = ()
    node: Node | None = None
    activation: int | None = None
    gradient: int | None = None
    needs_gradient: bool = False
    given_gradient: bool = False
    narrow: bool = False


@dataclass(slots=True, eq=False)
class Cut:
    """A place where a tensor without gradient was made from one that had it.

    Args:
        origin: where.
        kind: "detach", "tensor", "no_grad", "integer", "grad", "black box", or "number" for a value that
            left torch.
        nodes: the graph that ends here.
        parameters: the `id` of leaf tensors that end here without a graph of their own.
        escaped: whether its values then left torch (numpy, a Python number).
    """

    origin: Origin
    kind: str
    nodes: set[Node] = field(default_factory=set)
    parameters: set[int] = field(default_factory=set)
    escaped: bool = False


@dataclass(slots=True)
class _Frame:
    call: Call
    tainted: int
    sources: list[Tensor]


class Recording(TorchFunctionMode):
    """Records what happens between entering `watching` and leaving it; numbers stay on the device.

    Args:
        model: the module whose calls are recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.cuts: list[Cut] = []
        self.origins: dict[Node, Origin] = {}
        self.readings = Readings()
        self.backward = False
        self._model = model
        self._forward = False
        self._stack: list[_Frame] = []
        self._taints = WeakTensorKeyDictionary()
        self._known: dict[tuple[str, str, str, str], int] = {}
        self._handles: list[Any] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on; leave the inner forward with `forward_done`, and this block when the backward is done."""
        try:
            for path, module in self._model.named_modules():
                self._attach(written_name(path), module)
            self._forward = True
            yield
        finally:
            self._forward = self.backward = False
            for handle in self._handles:
                handle.remove()
            self._stack.clear()

    def forward_done(self) -> None:
        """From here on a module that runs again (a checkpoint's recomputation) is not recorded."""
        self._forward = False

    def taint(self, tensors: Iterable[Tensor]) -> int:
        """The cuts that tensors depend on, as bits in the order of `cuts`."""
        bits = 0
        if self.cuts:
            for tensor in tensors:
                bits |= self._taints.get(tensor, 0)
        return bits

    def place(self, node: Node) -> Origin:
        """Where a node was made; nodes made after the model are the closure's own."""
        return self.origins.get(node, Origin(OUTSIDE, type(node).__name__, ""))

    def here(self, operation: str) -> Origin:
        """Where the forward is now."""
        return Origin(self._path(), operation, _line())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if not self._forward or name in _VALUE_FREE:
            return func(*args, **kwargs)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name != "data":
                return func(*args, **kwargs)
        given = list(tensors_in(args)) + list(tensors_in(kwargs))
        sources = [tensor for tensor in given if tensor.requires_grad]
        roots = [_root(tensor) for tensor in sources]
        result = func(*args, **kwargs)
        made = list(tensors_in(result))
        if result is None and name == "__setitem__" and isinstance(args[0], Tensor):
            made = [args[0]]
        tainted = self.taint(given)
        if made:
            if sources and not any(tensor.requires_grad for tensor in made) and not name.endswith("_like"):
                tainted |= self._cut(name, made, roots)
            self._mark(made, tainted)
            self._attribute(made, name)
        elif name in _LEAVES_TORCH:
            self._escape(name, roots, tainted)
        return result

    def _cut(self, name: str, made: list[Tensor], roots: list[Any]) -> int:
        if not torch.is_grad_enabled():
            kind = "no_grad"
        elif name in ("detach", "detach_", "data"):
            kind = "detach"
        elif name in ("tensor", "as_tensor", "asarray"):
            kind = "tensor"
        elif not any(tensor.is_floating_point() or tensor.is_complex() for tensor in made):
            kind = "integer"
        else:
            kind = "grad" if name == "grad" else "black box"
        return self._enter(kind, name, roots)

    def _enter(self, kind: str, name: str, roots: Iterable[Any]) -> int:
        origin = Origin(self._path(), name, _line())
        index = self._known.setdefault((kind, *_key(origin)), len(self.cuts))
        if index == len(self.cuts):
            self.cuts.append(Cut(origin, kind))
        for root in roots:
            if isinstance(root, Tensor):
                self.cuts[index].parameters.add(id(root))
            else:
                self.cuts[index].nodes.add(root)
        return 1 << index

    def _escape(self, name: str, roots: list[Any], tainted: int) -> None:
        if roots:
            tainted |= self._enter("number", name, roots)
        for index, cut in enumerate(self.cuts):
            cut.escaped |= bool(tainted >> index & 1)

    def _mark(self, made: Iterable[Tensor], tainted: int) -> None:
        if tainted:
            for tensor in made:
                self._taints[tensor] = self._taints.get(tensor, 0) | tainted

    def _path(self) -> str:
        return self._stack[-1].call.path if self._stack else OUTSIDE

    def _attribute(self, made: Iterable[Tensor], name: str) -> None:
        pending = [tensor.grad_fn for tensor in made if tensor.grad_fn is not None]
        pending = [node for node in pending if node not in self.origins]
        if not pending:
            return
        path, line = self._path(), _line()
        while pending:
            node = pending.pop()
            if node not in self.origins and not is_leaf(node):
                self.origins[node] = Origin(path, name or type(node).__name__, line)
                pending.extend(edges(node))

    def _attach(self, path: str, module: nn.Module) -> None:
        own = any(p.requires_grad for p in module.parameters())

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._forward:
                return
            self._forward = False  # what the hook itself computes is not the model's
            given = list(tensors_in(args)) + list(tensors_in(kwargs))
            self._attribute(given, "")
            parent = self._stack[-1].call if self._stack else None
            call = Call(path, type(module).__name__, parent, own)
            sources = [tensor for tensor in given if tensor.requires_grad]
            call.given_gradient = bool(sources)
            self.calls.append(call)
            self._stack.append(_Frame(call, self.taint(given), sources))
            self._forward = True

        def leave(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if self._forward and self._stack:
                self._forward = False
                self._leave(module, self._stack[-1], list(tensors_in(output)))
                self._stack.pop()
                self._forward = True

        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def _leave(self, module: nn.Module, frame: _Frame, made: list[Tensor]) -> None:
        self._attribute(made, "")
        differentiable = any(tensor.requires_grad for tensor in made)
        if made and not self.taint(made):
            tainted = frame.tainted
            if not differentiable and torch.is_grad_enabled() and not tainted:
                own = [p for p in module.parameters() if p.requires_grad]
                roots = [_root(tensor) for tensor in frame.sources]
                if own or roots:
                    tainted = self._enter("black box", type(module).__name__, [*roots, *own])
            self._mark(made, tainted)
        main = next((tensor for tensor in made if tensor.is_floating_point()), None)
        if main is not None:
            self._read(frame.call, main)

    def _read(self, call: Call, main: Tensor) -> None:
        call.shape = tuple(main.shape)
        call.narrow = main.dtype == torch.float16
        call.activation = self.readings.norm(main)
        call.node = main.grad_fn
        call.needs_gradient = main.requires_grad
        if not main.requires_grad:
            return

        def arrived(gradient: Tensor) -> None:
            # returns None: anything else would replace the gradient
            if self.backward:
                call.gradient = self.readings.norm(gradient)

        self._handles.append(main.register_hook(arrived))


def _root(tensor: Tensor) -> Any:
    # a view made under no_grad says it requires grad and has no node: its base has
    while tensor.grad_fn is None and tensor._base is not None:
        tensor = tensor._base
    return tensor if tensor.grad_fn is None else tensor.grad_fn


def _key(origin: Origin) -> tuple[str, str, str]:
    return origin.path, origin.operation, origin.line


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY) and not name.startswith("<frozen"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
