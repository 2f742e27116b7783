"""Find how many states fit a budget, by counting the rollout's peak under fake tensors before it runs."""

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
        store: `Backprop()` where everything fits, else `Checkpointed(slots=...)` with the most slots that do.
        peak_bytes: the counted peak of forward and backward: what the rollout makes, gradients included,
            parameters and what was there before left out. With on="host", states on the CPU left out too.
        step_calls: how often the step will be called.
    """

    store: Store
    peak_bytes: int
    step_calls: int


_remembered: dict[Any, Plan] = {}
_MOST_REMEMBERED = 64


def choose(process: Process, leaves: Leaves, store: Checkpointed) -> Plan:
    """The plan for a budget; the same question is answered from memory the second time."""
    key = (signature(process, leaves), store)
    if key not in _remembered:
        found = _Search(process, leaves, store).plan()
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = found
    return _remembered[key]


class _Search:
    """The search for the largest number of slots whose counted peak fits."""

    def __init__(self, process: Process, leaves: Leaves, store: Checkpointed) -> None:
        assert store.budget is not None
        self.process, self.leaves, self.store = process, leaves, store
        self.budget = read_bytes(store.budget)
        self.stages = process.steps - process.first + (process.then is not None)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.state_bytes = max(sum(t.numel() * t.element_size() for t in tensors), 1)

    def plan(self) -> Plan:
        """Everything if it fits; else as many slots as do."""
        everything = self._all_stored()
        if everything is not None:
            return everything
        best: Plan | None = None
        refused: dict[int, int] = {}
        slots = self._guess()
        while slots not in refused and (best is None or slots > self._slots(best)):
            peak = self._count(slots)
            if peak <= self.budget:
                best = Plan(replace(self.store, budget=None, slots=slots), peak, self._calls(slots))
                # from here upwards: as many states as the slack holds, below what was refused
                slots = min(slots + (self.budget - peak) // self.state_bytes, self.stages)
                slots = min([slots, *(each - 1 for each in refused)])
            else:
                refused[slots] = peak
                over = -(-(peak - self.budget) // self.state_bytes)
                floor = 1 if best is None else self._slots(best) + 1
                slots = max(slots - over, floor)
        if best is not None:
            return best
        self._refuse(min(refused), refused[min(refused)])
        raise AssertionError("unreachable")

    def _slots(self, plan: Plan) -> int:
        assert isinstance(plan.store, Checkpointed)
        assert plan.store.slots is not None
        return plan.store.slots

    def _calls(self, slots: int) -> int:
        """With a read-out, which runs on its own as the last stage, that many of the calls are steps."""
        return self.process.first + step_calls(self.stages, slots) - (self.process.then is not None)

    def _all_stored(self) -> Plan | None:
        steps = self.process.steps
        if self.stages > 3:
            # every further step adds what the third added to the second, if steps are alike
            two, three = (self._peak(self._shorter(n), Backprop()) for n in (2, 3))
            if three + (steps - self.process.first - 3) * (three - two) > 1.05 * self.budget:
                return None
        peak = self._peak(self.process, Backprop())
        return Plan(Backprop(), peak, steps) if peak <= self.budget else None

    def _guess(self) -> int:
        small = self._shorter(min(4, self.process.steps - self.process.first))
        base = self._peak(small, replace(self.store, budget=None, slots=2))
        return min(max(2 + (self.budget - base) // self.state_bytes, 1), self.stages)

    def _count(self, slots: int) -> int:
        # with very few slots a long process takes very many calls, and the peak is reached early: count the
        # longest process that needs at most eight repetitions
        steps = min(self.process.steps - self.process.first, comb(slots + 8, slots))
        return self._peak(self._shorter(steps), replace(self.store, budget=None, slots=slots))

    def _shorter(self, steps: int) -> Process:
        return replace(self.process, steps=self.process.first + steps)

    def _peak(self, process: Process, store: Store) -> int:
        modules = nn.ModuleList(_modules(process))
        fake = FakeMode(allow_non_fake_inputs=True)
        counted = None if self.store.on == "device" else _device(self.leaves)
        with isolated(modules, ()), torch.random.fork_rng(), fake, explained():
            leaves = tuple(_twin(leaf, fake) for leaf in self.leaves)
            counter = _Counter(fake, counted)
            with counter.counting():
                _forward_and_backward(process, leaves, store)
        return counter.peak_bytes

    def _refuse(self, slots: int, peak: int) -> None:
        longest = f"the smallest plan, slots={slots}, takes {peak} bytes ({scaled(peak, 'B')})"
        mend = (
            f"What would fit: budget={peak}; or a smaller batch, Truncated(last=...), on='host', or the "
            "read-out moved into then=."
        )
        raise ArgumentError("budget", self.store.budget, f"more, since {longest}", mend)


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
