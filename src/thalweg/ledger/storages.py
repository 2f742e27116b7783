"""Counting the memory and the operations of a computation, on real tensors and on fake ones alike.

A dispatch mode sees every tensor that an operator returns; a weak reference says when its storage dies. What
was there before (parameters, buffers, the batch) never enters the count. Memory that a kernel takes and gives
back within one operator stays invisible.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thalweg.ledger.operations import FORMULAS

OUTSIDE = "(outside)"


@dataclass(slots=True, eq=False)
class _Storage:
    bytes: int
    forward: bool  # created in a forward, hence a candidate for being kept for backward
    owner: str  # the module that saved it first, or else the one that made it
    saved: bool = False  # seen by a saved-tensor hook
    returned: bool = False  # holds what the closure handed out
    reference: weakref.ref[torch.UntypedStorage] | None = None


class StorageCounter(TorchDispatchMode):
    """Counts the storages made while it is active, and the operations.

    Args:
        model: its submodules give the names in `by_module`; None attributes nothing.
        fake: the fake mode that the computation runs under, or None.
        attribute: push saved-tensor hooks, which know who saved a tensor; without them a storage belongs to
            the module that made it. `torch.func.grad` and its kin refuse to run under such hooks.
    """

    supports_higher_order_operators = True

    def __init__(
        self, model: nn.Module | None = None, fake: FakeTensorMode | None = None, *, attribute: bool = True
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.saved_bytes = 0
        self.operations = 0
        self.operators: set[Any] = set()
        self.by_module: dict[str, int] = {}
        self._fake = fake
        self._attribute = attribute
        self._storages: dict[int, _Storage] = {}
        self._model = model
        named = model.named_modules() if model is not None else ()
        # a compiled module runs here as the code that it was made from, under that code's names
        self._names = {id(m): written_name(name) for name, m in named}
        self._path: list[str] = []
        self._forward = False
        self._backward_closes = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the body, and follow which module runs."""
        before = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        after = nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
        try:
            # around everything, so that a rule which looks for hooks within the forward finds none of ours
            with warnings.catch_warnings(), self._watch_savers(), self:
                # the extra call for the wrapper of a compiled module does no harm here
                warnings.filterwarnings(
                    "ignore", r"Using `torch.compile\(module\)` when there are global hooks"
                )
                yield
        finally:
            before.remove()
            after.remove()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark a body as a forward: what it makes and leaves alive is kept for backward."""
        outer, self._forward = self._forward, True
        try:
            yield
        finally:
            self._forward = outer

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Mark a body that runs its own forward and backward: the count is taken when a backward begins."""
        self._backward_closes = True
        try:
            with self.forward():
                yield
        finally:
            self._backward_closes = False

    def hand_out(self, result: Any) -> bool:
        """Note that `result` is the caller's and no longer the forward's; whether a graph hangs on it."""
        for storage in _storages(result, self._fake):
            entry = self._storages.get(storage._cdata)
            if entry is not None:
                entry.returned = True
        return any(leaf.requires_grad for leaf in tree_leaves(result) if isinstance(leaf, Tensor))

    def close_forward(self) -> None:
        """Take the count of what is kept for backward now, without what was handed out and not saved."""
        weights = self._weights()
        kept = [
            e
            for address, e in self._storages.items()
            if e.bytes and e.forward and (e.saved or not e.returned) and address not in weights
        ]
        total = sum(e.bytes for e in kept)
        if total > self.saved_bytes:
            self.saved_bytes = total
            self.by_module = {}
            for entry in kept:
                self.by_module[entry.owner] = self.by_module.get(entry.owner, 0) + entry.bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return NotImplemented
        in_backward = torch._C._current_graph_task_id() != -1
        if self._backward_closes and in_backward and self._forward:
            self._forward = False
            self.close_forward()
        elif self._backward_closes and not in_backward:
            self._forward = True
        if isinstance(func, torch._ops.HigherOrderOperator):
            out = func(*args, **kwargs)
            self._record(out, set())
            return out
        if torch.is_inference_mode_enabled() and _made_of_others(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.operators.add(func._overloadpacket)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        self._record(out, self._aliased(func, args, kwargs))
        return out

    def _weights(self) -> set[int]:
        # a rule that swaps weights, or a module that replaces a buffer, points them at storages made here
        if self._model is None:
            return set()
        held = [*self._model.parameters(), *self._model.buffers()]
        return {storage._cdata for storage in _storages(held, self._fake)}

    def _aliased(self, func: Any, args: Any, kwargs: Any) -> set[int]:
        if func is torch.ops.aten.lift_fresh.default:
            # torch.tensor(...) enters here: its storage is new although it came as an argument
            return set()
        return {storage._cdata for storage in _storages((args, kwargs), self._fake)}

    def _record(self, out: Any, aliased: set[int]) -> None:
        for storage in _storages(out, self._fake):
            address = storage._cdata
            known = self._storages.get(address)
            size = storage.nbytes()
            if known is not None:
                self._grow(size - known.bytes)
                known.bytes = size
            elif address not in aliased:
                owner = self._path[-1] if self._path else OUTSIDE
                entry = _Storage(size, self._forward, owner)
                entry.reference = weakref.ref(storage, self._freed(address))
                self._storages[address] = entry
                self._grow(size)

    def _grow(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, address: int) -> Callable[[object], None]:
        def free(_reference: object) -> None:
            self.live_bytes -= self._storages.pop(address).bytes

        return free

    def _watch_savers(self) -> AbstractContextManager[Any]:
        def pack(tensor: Tensor) -> Tensor:
            for storage in _storages(tensor, self._fake) if self._forward else []:
                entry = self._storages.get(storage._cdata)
                if entry is not None and entry.forward and not entry.saved:
                    entry.saved = True
                    entry.owner = self._path[-1] if self._path else OUTSIDE
            # a tensor that carries its own node would keep itself alive after its graph has died
            return tensor.detach()

        return saved_tensors_hooks(pack, lambda tensor: tensor) if self._attribute else nullcontext()

    def _enter_module(self, module: nn.Module, _inputs: object) -> None:
        outer = self._path[-1] if self._path else OUTSIDE
        self._path.append(self._names.get(id(module), outer))

    def _leave_module(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        self._path.pop()


def written_name(path: str) -> str:
    """The path of a module or parameter as its author wrote it, without the wrappers of `torch.compile`.

    Example:
        >>> written_name("encoder._orig_mod.0")
        'encoder.0'
    """
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _made_of_others(func: Any) -> bool:
    # outside inference mode autograd has taken these apart before they arrive here
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return func._overloadpacket not in FORMULAS and has_kernel(func.name(), "CompositeImplicitAutograd")


def _storages(tree: Any, fake: FakeTensorMode | None) -> list[torch.UntypedStorage]:
    return [
        part.untyped_storage()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor)
        for part in _parts(leaf, fake)
    ]


def _parts(tensor: Tensor, fake: FakeTensorMode | None) -> list[Tensor]:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout is not torch.strided:
        return []
    if fake is not None and not isinstance(tensor, FakeTensor):
        # the fake twin of a tensor that was there before; the fake mode remembers it by identity
        return [fake.from_tensor(tensor)]
    return [tensor]


_aten = torch.ops.aten
METADATA = {
    _aten.sym_is_contiguous.default,
    _aten.is_contiguous.default,
    _aten.is_contiguous.memory_format,
    _aten.is_strides_like_format.default,
    _aten.is_non_overlapping_and_dense.default,
    _aten.size.default,
    _aten.sym_size.default,
    _aten.stride.default,
    _aten.sym_stride.default,
    _aten.storage_offset.default,
    _aten.sym_storage_offset.default,
    _aten.numel.default,
    _aten.sym_numel.default,
    _aten.dim.default,
    torch.ops.prim.device.default,
    torch.ops.prim.layout.default,
}
