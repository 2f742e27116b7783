"""Find what fits a budget, by counting the rollout's peak under fake tensors before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import GradientEdge, Node
from torch.nn.modules import module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from thalweg.borrowed import isolated
from thalweg.errors import ArgumentError
from thalweg.ledger.fake import FakeMode, explained
from thalweg.ledger.storages import METADATA, StorageCounter
from thalweg.rollouts.checkpointed import Checkpointed, Leaves, calls_by_pieces, read_bytes
from thalweg.rollouts.guard import reached, signature
from thalweg.rollouts.process import Process
from thalweg.rollouts.route import Store
from thalweg.step import Backprop
from thalweg.table import scaled


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout with a budget does.

    Args:
        store: `Backprop()` where everything fits, else `Checkpointed(slots=..., stride=...)` with the fewest
            calls of the step that fit.
        peak_bytes: the counted peak of forward and backward: what the rollout makes, gradients included,
            parameters and what was there before left out. With on="host", states on the CPU left out too.
        step_calls: how often the step will be called.
    """

    store: Store
    peak_bytes: int
    step_calls: int


_remembered: dict[Any, Plan] = {}
_counted: dict[Any, int] = {}
_MOST_REMEMBERED = 256
_MOST_COUNTS = 10


def choose(process: Process, leaves: Leaves, store: Checkpointed) -> Plan:
    """The plan for a budget; the same question is answered from memory the second time."""
    kind = signature(process, leaves)
    if (kind, store) not in _remembered:
        _remember(_remembered, (kind, store), _Search(process, leaves, store, kind).plan())
    return _remembered[kind, store]


def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if len(memory) >= _MOST_REMEMBERED:
        memory.pop(next(iter(memory)))
    memory[key] = value


class _Search:
    """The search for the plan with the fewest calls whose counted peak fits.

    A few short counts give the bytes of a step's graph and predict those of every pair of slots and stride.
    The pair with the fewest calls that should fit is then counted in full, and the prediction shifted by what
    it was wrong.
    """

    def __init__(self, process: Process, leaves: Leaves, store: Checkpointed, kind: Any) -> None:
        assert store.budget is not None
        self.process, self.leaves, self.store, self.kind = process, leaves, store, kind
        self.budget = read_bytes(store.budget)
        self.steps = process.steps - process.first
        self.read_out = process.then is not None
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.state_bytes = max(sum(t.numel() * t.element_size() for t in tensors), 1)
        self.graph_bytes = 1

    def plan(self) -> Plan:
        """Everything if it fits; else what needs the fewest calls."""
        if self.steps == 0:
            return Plan(Backprop(), 0, self.process.steps)
        # not one step and two: gradients of parameters live twice only from the second step on
        two, three = (self._peak(min(n, self.steps), Backprop()) for n in (2, 3))
        self.graph_bytes = max(three - two, 1)
        if two + (self.steps - 2) * self.graph_bytes <= 1.05 * self.budget:
            peak = self._peak(self.steps, Backprop())
            if peak <= self.budget:
                return Plan(Backprop(), peak, self.process.steps)
        return self._search()

    def _search(self) -> Plan:
        offset = self._peak(min(3, self.steps), self._store(2, 1)) - self._predicted(2, 1)
        best: Plan | None = None
        refused: set[tuple[int, int]] = set()
        for _ in range(_MOST_COUNTS):
            found = self._fewest(self.budget - offset, refused)
            if found is None or (best is not None and found[0] >= best.step_calls):
                break
            calls, slots, stride = found
            peak = self._count(slots, stride)
            offset = peak - self._predicted(slots, stride)
            if peak <= self.budget:
                best = Plan(self._store(slots, stride), peak, calls)
            refused.add((slots, stride))
        if best is not None:
            return best
        peak = self._count(1, 1)
        if peak > self.budget:
            self._refuse(peak)
        return Plan(self._store(1, 1), peak, self._calls(1, 1))

    def _fewest(self, room: int, refused: set[tuple[int, int]]) -> tuple[int, int, int] | None:
        """Calls, slots and stride of the pair with the fewest calls that should fit."""
        choices = []
        longest = self.steps if self.read_out else self.steps - 1
        for stride in range(1, min(longest, room // self.graph_bytes + 1) + 1):
            left = room - self._predicted(0, stride)
            slots = min(left // self.state_bytes, -(-self.steps // stride) + self.read_out)
            # fewer slots take more calls: of each stride only the most that fit, and one less after a refusal
            while slots >= 1 and (slots, stride) in refused:
                slots -= 1
            if slots >= 1:
                key = (self._calls(slots, stride), self._predicted(slots, stride), slots, stride)
                choices.append(key)
        if not choices:
            return None
        calls, _, slots, stride = min(choices)
        return calls, slots, stride

    def _predicted(self, slots: int, stride: int) -> int:
        return slots * self.state_bytes + (stride - 1) * self.graph_bytes

    def _calls(self, slots: int, stride: int) -> int:
        return self.process.first + calls_by_pieces(self.steps, slots, stride, self.read_out)

    def _store(self, slots: int, stride: int) -> Checkpointed:
        return replace(self.store, budget=None, slots=slots, stride=stride)

    def _count(self, slots: int, stride: int) -> int:
        # with very few slots a long process takes very many calls, and the peak is reached early: count the
        # longest process that needs at most four repetitions
        steps = min(self.steps, stride * comb(slots + 4, slots))
        return self._peak(steps, self._store(slots, stride))

    def _peak(self, steps: int, store: Store) -> int:
        key = (self.kind, steps, store)
        if key not in _counted:
            _remember(_counted, key, self._run(steps, store))
        return _counted[key]

    def _run(self, steps: int, store: Store) -> int:
        process = replace(self.process, steps=self.process.first + steps)
        modules = nn.ModuleList(_modules(process))
        counted = None if self.store.on == "device" else _device(self.leaves)
        with _alone() as fake, isolated(modules, ()), torch.random.fork_rng(), fake, explained():
            leaves = tuple(_twin(leaf, fake) for leaf in self.leaves)
            counter = _Counter(fake, counted)
            with counter.counting():
                _forward_and_backward(process, leaves, store)
        return counter.peak_bytes

    def _refuse(self, peak: int) -> None:
        smallest = f"the smallest plan, slots=1, takes {peak} bytes ({scaled(peak, 'B')})"
        mend = (
            f"What would fit: budget={peak}; or a smaller batch, Truncated(last=...), on='host', or the "
            "read-out moved into then=."
        )
        raise ArgumentError("budget", self.store.budget, f"more, since {smallest}", mend)


@contextmanager
def _alone() -> Iterator[FakeTensorMode]:
    """Hide what the body does from modes and hooks that count or trace; the fake mode to use in it."""
    tables = (module._global_forward_pre_hooks, module._global_forward_hooks)
    hidden = [(table, dict(table)) for table in tables]
    for table in tables:
        table.clear()
    torch.clear_autocast_cache()
    try:
        with _disable_current_modes() as modes:
            # the caller's own, where the process is being priced: two fake modes do not mix
            outer = [mode for mode in modes if isinstance(mode, FakeTensorMode)]
            yield outer[-1] if outer else FakeMode(allow_non_fake_inputs=True)
    finally:
        for table, hooks in hidden:
            table.update(hooks)
        # else what follows under the caller's autocast would be given fake weights
        torch.clear_autocast_cache()


class _Counter(StorageCounter):
    """Counts what lives on one device only, when states are sent to the host."""

    def __init__(self, fake: FakeTensorMode, device: torch.device | None) -> None:
        super().__init__(None, fake, attribute=False)
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _LEFT_ALONE:
            # as the fake mode would itself, which then however looks up no operator that it has seen before
            args = [self._twin(arg) for arg in args]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _twin(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [self._twin(part) for part in argument]
        if not isinstance(argument, Tensor) or isinstance(argument, FakeTensor):
            return argument
        assert self._fake is not None
        return self._fake.from_tensor(argument)

    def _record(self, out: Any, aliased: set[int]) -> None:
        if self._device is not None:
            out = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device == self._device]
        super()._record(out, aliased)


# a constant enters by the first one, whose value the fake mode wants to see; the others ask for a shape
_LEFT_ALONE = {torch.ops.aten.lift_fresh.default, *METADATA}


def _device(leaves: Leaves) -> torch.device | None:
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return devices[0] if devices[0].type != "cpu" else None


def _modules(process: Process) -> list[nn.Module]:
    return [m for m in reached(process.step, process.network, process.then) if isinstance(m, nn.Module)]


def _twin(leaf: Any, fake: FakeTensorMode) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    twin = leaf.detach() if isinstance(leaf, FakeTensor) else fake.from_tensor(leaf.detach())
    return twin.requires_grad_(leaf.requires_grad)


def _forward_and_backward(process: Process, leaves: Leaves, store: Store) -> None:
    fence = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert fence is not None
    result = process.run(leaves, store)
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    if outputs:
        edges = _edges([t.grad_fn for t in outputs], fence._sequence_nr())
        torch.autograd.grad(outputs, edges, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _edges(roots: list[Node | None], fence: int) -> list[GradientEdge]:
    """Where the graph made since `fence` ends: at leaves, and at the caller's graphs, which stay alone."""
    ends: dict[tuple[Node, int], None] = {}
    seen: set[Node] = set()
    stack = [root for root in roots if root is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for parent, index in node.next_functions:
            if parent is None:
                continue
            if not parent.next_functions or parent._sequence_nr() < fence:
                ends[(parent, index)] = None
            else:
                stack.append(parent)
    return [GradientEdge(node, index) for node, index in ends]
