"""Find what fits a budget, by counting the rollout's peak under fake tensors before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_leaves

from thalweg.errors import ArgumentError
from thalweg.ledger.fake import FakeMode, explained
from thalweg.ledger.storages import StorageCounter
from thalweg.parameters import isolated
from thalweg.rollouts.checkpointed import Checkpointed, Leaves, read_bytes, step_calls
from thalweg.rollouts.guard import reached, signature
from thalweg.rollouts.process import Process
from thalweg.rollouts.route import Store
from thalweg.step import Backprop
from thalweg.table import scaled


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout with a budget does.

    Args:
        store: `Backprop()` where everything fits, else `Checkpointed(slots=..., whole=...)` with the fewest
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

    Plans are numbered by what they keep: level L keeps L states up to one per step, and above that the graph
    of one more step each. A few short counts predict the bytes of a level; the level chosen is then counted
    in full, and the prediction shifted by what it was wrong.
    """

    def __init__(self, process: Process, leaves: Leaves, store: Checkpointed, kind: Any) -> None:
        assert store.budget is not None
        self.process, self.leaves, self.store, self.kind = process, leaves, store, kind
        self.budget = read_bytes(store.budget)
        self.steps = process.steps - process.first
        self.read_out = int(process.then is not None)
        self.states = self.steps + self.read_out
        # without a read-out the graph of the last step is kept anyway
        self.levels = max(self.states + self.steps - 2 + 2 * self.read_out, 1)
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
        short = min(3, self.steps)
        offset = self._peak(short, self._at(2)) - self._predicted(2)
        best: Plan | None = None
        fits, over, peak = 0, self.levels + 1, 0
        while over - fits > 1:
            level = min(max(self._guess(offset), fits + 1), over - 1)
            peak = self._count(level)
            offset = peak - self._predicted(level)
            if peak > self.budget:
                over = level
                continue
            store = self._at(level)
            fits, best = level, Plan(store, peak, self._calls(store))
            if self._guess(offset) <= level:
                break
        if best is None:
            self._refuse(peak)
        assert best is not None
        return best

    def _predicted(self, level: int) -> int:
        return min(level, self.states) * self.state_bytes + max(level - self.states, 0) * self.graph_bytes

    def _guess(self, offset: int) -> int:
        """The highest level that the prediction lets fit, or 0."""
        left = self.budget - offset
        states = left // self.state_bytes
        if states <= self.states:
            return max(states, 0)
        return self.states + (left - self.states * self.state_bytes) // self.graph_bytes

    def _at(self, level: int) -> Checkpointed:
        if level <= self.states:
            return replace(self.store, budget=None, slots=level)
        whole = level - self.states + 1 - self.read_out
        return replace(self.store, budget=None, slots=max(self.steps - whole, 1), whole=whole)

    def _calls(self, store: Checkpointed) -> int:
        """What follows the checkpoints, steps kept whole or a read-out, is a stage that runs once."""
        assert store.slots is not None
        head, first = self.steps - store.whole, self.process.first
        if head == 0:
            return first + self.steps
        follows = int(bool(store.whole or self.read_out))
        return first + step_calls(head + follows, store.slots) - follows + store.whole

    def _count(self, level: int) -> int:
        store = self._at(level)
        # with very few slots a long process takes very many calls, and the peak is reached early: count the
        # longest process that needs at most eight repetitions
        assert store.slots is not None
        steps = self.steps if store.whole else min(self.steps, comb(store.slots + 8, store.slots))
        return self._peak(steps, store)

    def _peak(self, steps: int, store: Store) -> int:
        key = (self.kind, steps, store)
        if key not in _counted:
            _remember(_counted, key, self._run(steps, store))
        return _counted[key]

    def _run(self, steps: int, store: Store) -> int:
        process = replace(self.process, steps=self.process.first + steps)
        modules = nn.ModuleList(_modules(process))
        fake = FakeMode(allow_non_fake_inputs=True)
        counted = None if self.store.on == "device" else _device(self.leaves)
        with isolated(modules, ()), torch.random.fork_rng(), fake, explained():
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


class _Counter(StorageCounter):
    """Counts what lives on one device only, when states are sent to the host."""

    def __init__(self, fake: FakeTensorMode, device: torch.device | None) -> None:
        super().__init__(None, fake, attribute=False)
        self._device = device

    def _record(self, out: Any, aliased: set[int]) -> None:
        if self._device is not None:
            out = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device == self._device]
        super()._record(out, aliased)


def _device(leaves: Leaves) -> torch.device | None:
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return devices[0] if devices[0].type != "cpu" else None


def _modules(process: Process) -> list[nn.Module]:
    return [m for m in reached(process.step, process.network, process.then) if isinstance(m, nn.Module)]


def _twin(leaf: Any, fake: FakeTensorMode) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    twin = fake.from_tensor(leaf.detach())
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
