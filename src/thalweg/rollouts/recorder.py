"""The tensors a function closes over: found while it runs, cut off, and given their gradients afterwards.

A process with its own reverse sweep runs its function without leaving a graph, so the gradients of whatever
the function uses besides its arguments would be lost. Here every evaluation of the forward is recorded for a
moment: its graph is walked down to the leaves (parameters, conditions that require grad) and to the results
of earlier operations (an embedding computed outside), and then dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from thalweg.errors import UnsupportedError
from thalweg.rollouts.tableaus import State

Function = Callable[[State, Tensor], State]


class Recorder:
    """Runs a function of (state, time) in a forward and again in a backward, and keeps its captured tensors.

    Args:
        function: takes and returns a tuple of tensors.
        state: a first state, for its device.
        name: the policy on whose behalf, for messages.
        replay: whether a function that draws random numbers is run again with the same ones; else refused.

    Attributes:
        captured: what the function closes over and requires grad, in the order of discovery.
        gradients: what `pull` has gathered for them, in the same order; None where nothing came.
        evaluations: how often the function ran, forward and backward together.
    """

    def __init__(self, function: Function, state: State, name: str, *, replay: bool) -> None:
        self.captured: list[Tensor] = []
        self.gradients: list[Tensor | None] = []
        self.evaluations = 0
        self._function = function
        self._name = name
        self._replay = replay
        self._targets: list[Tensor] = []  # the captured leaves themselves, and the stand-ins of the others
        self._known: set[int] = set()
        self._draws: dict[Hashable, list[Tensor]] = {}
        self._cut: _Cut | None = None
        self._fake = isinstance(state[0], FakeTensor) or state[0].is_meta
        self._devices = tuple({part.device for part in state if part.device.type == "cuda"})
        # the backward may run outside the caller's autocast, and must compute as the forward did
        self._autocast = {
            kind: torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in {"cpu", state[0].device.type}
            if torch.amp.is_autocast_available(kind)
        }
        with torch.enable_grad():
            # every node of the function's own graphs comes later than this one
            marker = torch.ones((), requires_grad=True).view(1).grad_fn
        assert marker is not None
        self._marker: int = marker._sequence_nr()

    def value(self, state: State, time: Tensor, key: Hashable) -> State:
        """Evaluate in the forward: the result without a graph; what it closes over is noted."""
        before = self._random_states()
        # the first time with a leaf below, so that frozen layers leave nodes too and can be looked at
        inputs = state if self.evaluations else tuple(_leaf(part) for part in state)
        found, result, complete = self._recorded(inputs, time)
        if not complete and self._cut is None:
            self._set_random_states(before)
            self._cut = _Cut(self._marker)
            found, result, complete = self._recorded(inputs, time)
        if not complete:
            raise UnsupportedError(
                f"{self._name}: the field closes over a tensor that is the result of earlier operations, and "
                "uses it where it cannot be seen (a compiled or custom function). Make it a part of the "
                "state, or use Backprop() or Checkpointed()"
            )
        self._compare_random_states(before, key)
        self._note(found, inputs)
        return result

    def graph(self, state: State, time: Tensor, key: Hashable = None) -> tuple[State, State]:
        """Evaluate again with a graph: the state as leaves, and the result attached to them."""
        draws = self._draws.get(key)
        leaves = tuple(_leaf(part) for part in state)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._as_in_forward())
            if draws is not None:
                stack.enter_context(self._random_states_set(draws))
            return leaves, self._run(leaves, time)

    def unmet(self, leaves: State, outputs: State) -> list[weakref.ref[Tensor]]:
        """The leaves below a graph that the forward did not meet; for `refuse`, when the graph is gone."""
        known = self._known | {id(leaf) for leaf in leaves}
        found, _ = _boundary(outputs, None)
        return [weakref.ref(leaf) for leaf in found if id(leaf) not in known]

    def refuse(self, unmet: list[weakref.ref[Tensor]]) -> None:
        """Raise if any of them outlived the graph, and so is not one that the function made for itself."""
        for reference in unmet:
            leaf = reference()
            if leaf is not None:
                raise UnsupportedError(
                    f"{self._name}: the backward meets a captured tensor of shape {tuple(leaf.shape)} that "
                    "the forward did not use, so its gradient has nowhere to go. Use Discrete() or Backprop()"
                )

    def pull(self, leaves: State, outputs: State, cotangents: State) -> State:
        """Pull cotangents back through a graph, which is freed: return the state's, add up the others."""
        pairs = [(o, c) for o, c in zip(outputs, cotangents) if o.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        with _without_hooks(self.captured):
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [*leaves, *self._targets],
                [c for _, c in pairs],
                allow_unused=True,
            )
        for index, gradient in enumerate(found[len(leaves) :]):
            if gradient is None:
                continue
            total = self.gradients[index]
            if total is None:
                # a copy: autograd may have handed back the caller's cotangent
                self.gradients[index] = gradient.clone()
            else:
                total.add_(gradient)
        return tuple(
            torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found)
        )

    def _run(self, state: State, time: Tensor) -> State:
        self.evaluations += 1
        if self._cut is None:
            return self._function(state, time)
        with self._cut:
            # a view, so that a field which returns the captured tensor itself is seen too
            return tuple(output.view_as(output) for output in self._function(state, time))

    def _recorded(self, inputs: State, time: Tensor) -> tuple[list[weakref.ref[Tensor]], State, bool]:
        with torch.enable_grad(), self._as_in_forward():
            outputs = self._run(inputs, time)
        leaves, complete = _boundary(outputs, self._marker)
        return [weakref.ref(leaf) for leaf in leaves], tuple(o.detach() for o in outputs), complete

    def _note(self, found: list[weakref.ref[Tensor]], inputs: State) -> None:
        originals = self._cut.originals if self._cut is not None else {}
        mine = {id(part) for part in inputs}
        for reference in found:
            # the graph is gone by now, and with it the leaves that the function made for itself
            leaf = reference()
            if leaf is not None and id(leaf) not in self._known and id(leaf) not in mine:
                self._known.add(id(leaf))
                self._targets.append(leaf)
                self.captured.append(originals.get(id(leaf), leaf))
                self.gradients.append(None)

    @contextmanager
    def _as_in_forward(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in self._autocast.items():
                if dtype is not None or torch.is_autocast_enabled(kind):
                    # without the cache, whose entries are nodes of someone else's graph
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
                    )
            yield

    def _random_states(self) -> list[Tensor]:
        if self._fake:
            return []
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _set_random_states(self, states: list[Tensor]) -> None:
        if not states:
            return
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:]):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def _random_states_set(self, states: list[Tensor]) -> Iterator[None]:
        now = self._random_states()
        self._set_random_states(states)
        try:
            yield
        finally:
            self._set_random_states(now)

    def _compare_random_states(self, before: list[Tensor], key: Hashable) -> None:
        if all(map(torch.equal, before, self._random_states())):
            return
        if not self._replay:
            raise UnsupportedError(
                f"{self._name}: the field draws random numbers (dropout in training mode?), which cannot be "
                "repeated here. Call .eval(), or use Discrete() or Checkpointed() with fixed steps"
            )
        self._draws[key] = before


class _Cut(TorchFunctionMode):
    """Puts a stand-in leaf in the place of every tensor that comes out of operations before the process."""

    def __init__(self, marker: int) -> None:
        super().__init__()
        self.originals: dict[int, Tensor] = {}  # by the stand-in's id
        self._stand_ins: dict[int, Tensor] = {}  # by the original's id
        self._marker = marker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(self._swap, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _swap(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        stand_in = self._stand_ins.get(id(value))
        if stand_in is not None:
            return stand_in
        if value.grad_fn is None or value.grad_fn._sequence_nr() >= self._marker:
            return value
        stand_in = _leaf(value)
        self._stand_ins[id(value)] = stand_in
        self.originals[id(stand_in)] = value
        return stand_in


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _boundary(outputs: Sequence[Tensor], marker: int | None) -> tuple[list[Tensor], bool]:
    """The leaves below some outputs, and whether no node older than the marker was met."""
    leaves = {id(o): o for o in outputs if o.requires_grad and o.grad_fn is None}
    stack: list[Any] = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(stack)
    complete = True
    while stack:
        node = stack.pop()
        name = node.name()
        if name == "torch::autograd::AccumulateGrad":
            leaves[id(node.variable)] = node.variable
            continue
        if marker is not None and node._sequence_nr() < marker:
            complete = False
            continue
        if "BatchNorm" in name:
            _refuse_running_statistics(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return list(leaves.values()), complete


def _refuse_running_statistics(node: Any) -> None:
    # evaluation mode has a node of the same name on some devices
    if getattr(node, "_saved_training", True) and getattr(node, "_saved_running_mean", None) is not None:
        raise UnsupportedError(
            "a batch norm in training mode would update its running statistics again when the backward "
            "evaluates the field again. Call .eval() on it, or use Backprop() or Checkpointed()"
        )


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    # hooks of a captured tensor belong to its whole gradient, not to the share of one evaluation
    hooked = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in hooked:
            hooks.update(kept)
